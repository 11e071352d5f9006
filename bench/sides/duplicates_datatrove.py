"""The same by datatrove's four stages (signature, buckets, cluster, filter) in one process."""

import json
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import load_word_tokenizer


def main() -> None:
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    config = MinhashConfig(n_grams=job["words"], num_buckets=job["bands"], hashes_per_bucket=job["rows"])
    signature = minhash.MinhashDedupSignature(f"{out}/signatures", config=config, language="eng")
    if job["split"]:
        signature.word_tokenizer.word_tokenize = str.split
    else:
        load_word_tokenizer("eng").word_tokenize("what it loads is not counted")
    reader = JsonlReader(job["in"], compression=None)
    kept = JsonlWriter(f"{out}/kept", output_filename="kept.jsonl", compression=None)
    stages = [
        ([reader, signature], 1),
        ([minhash.MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)], job["bands"]),
        ([minhash.MinhashDedupCluster(f"{out}/buckets", f"{out}/removed", config=config)], 1),
        ([reader, minhash.MinhashDedupFilter(f"{out}/removed"), kept], 1),
    ]
    start, wall = time.process_time(), time.perf_counter()
    for number, (pipeline, tasks) in enumerate(stages):
        logs = f"{out}/logs-{number}"
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    lines = (out / "kept" / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    result = {
        "processor_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - wall,
        "kept": [json.loads(line)["id"] for line in lines],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()

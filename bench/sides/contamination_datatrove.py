"""The same by datatrove's filter: `JOB.json FOLDER [split]`. Its index is made by its own function from the
questions, without the part of its indexer that needs lighteval.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer


def main() -> None:
    job, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    config = NGramsDecontConfig(n_grams=13, find_query_ngrams=True)
    decontaminate = NGramsDecontFilter(str(folder), config, language="eng")
    decontaminate.tokenizer.word_tokenize("what it loads is not counted")
    if sys.argv[3:] == ["split"]:
        decontaminate.tokenizer.word_tokenize = str.split
    hashes: set[int] = set()
    for item in job["items"]:
        # a label for which there is no n-gram, so that the questions alone are looked for
        hashes.update(NGramsDecontIndexer.compute_hashes(decontaminate, "", item["question"]))
    np.array(sorted(hashes), config.hash_config.np_descr).tofile(folder / "items.index.hashes")
    decontaminate.load_index_hashes()
    start, found = time.process_time(), []
    for number, text in enumerate(job["texts"]):
        if decontaminate.filter(Document(text=text, id=str(number))) is not True:
            found.append(number)
    print("RESULT " + json.dumps({"processor_seconds": time.process_time() - start, "found": found}))


if __name__ == "__main__":
    main()

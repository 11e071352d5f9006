"""Near duplicates by Ropewalk in one process: JSON lines in, those that stay out. Argument: {json}."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ropewalk.clean.duplicates.minhash import NearDuplicates
from ropewalk.clean.step import Texts

BATCH = 500


class FileParts:
    """A file of JSON lines is a part; what `map` wrote lies beside the output as Parquet."""

    def __init__(self, files: Sequence[Path], out: Path) -> None:
        self.files, self.out = files, out
        self.sizes: list[int] = []

    def map(self, step: NearDuplicates) -> None:
        for number, file in enumerate(self.files):
            texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
            tables = [step.map(Texts(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]
            pq.write_table(pa.concat_tables(tables), self.out / f"{number}.parquet")
            self.sizes.append(len(texts))

    def mapped(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        return pq.read_table(self.out / f"{part}.parquet", columns=columns)

    def kept(self, part: int) -> np.ndarray:
        return np.ones(self.sizes[part], bool)

    def preference(self, part: int) -> np.ndarray:
        return np.zeros(self.sizes[part])

    def texts(self, part: int, rows: np.ndarray) -> list[str]:
        wanted = set(rows.tolist())
        with self.files[part].open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for number, line in enumerate(file) if number in wanted]


def main() -> None:
    job = json.loads(sys.argv[1])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    step = NearDuplicates(threshold=job["threshold"], recall=job["recall"], words=job["words"])
    start, wall = time.process_time(), time.perf_counter()
    parts = FileParts(sorted(Path(job["in"]).glob("*.jsonl")), out)
    parts.map(step)
    kept = []
    with (out / "kept.jsonl").open("w", encoding="utf-8") as target:
        for file, table in zip(parts.files, step.reduce(parts), strict=True):
            with file.open(encoding="utf-8") as source:
                for line, of in zip(source, table["near_duplicate_of"].to_pylist(), strict=True):
                    if of == -1:
                        target.write(line)
                        kept.append(json.loads(line)["id"])
    result = {
        "processor_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - wall,
        "kept": kept,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()

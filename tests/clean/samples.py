"""Texts on which the cleaning steps are tested: odd ones, and real ones cut to pages."""

import json
import random
from pathlib import Path

ODD = [
    "",
    " ",
    "\n",
    "\n\n\na\n\n",
    "one",
    "a b",
    "...\n…\n. . .",
    "• x\n- y\n* z\n\n#",
    "日本語。テキスト！",
    "\ud800 broken \x00 text\r\nwith\rends",
    "Word. " * 40,
    "the same line\n" * 9,
    "first\n\nsecond\n\nfirst\n\nsecond",
    'e.g. lower case. Upper? Yes! "Quoted." 3.14 and (more).',
]


def pages(shared: Path, count: int = 200, size: int = 2700, seed: int = 0) -> list[str]:
    """Real text of several kinds in pieces of about `size` characters that end with a line."""
    data = shared / "data"
    whole = [json.loads(line)["text"] for line in (data / "peps.jsonl").open()]
    whole += [json.loads(line)["text"] for line in (data / "rust_book.jsonl").open()]
    whole += [(data / "wikitext2_valid.txt").read_text(), (data / "tinyshakespeare.txt").read_text()]
    found = []
    for text in whole:
        place = 0
        while place < len(text):
            end = text.find("\n", place + size)
            end = len(text) if end < 0 else end
            found.append(text[place:end].strip("\n"))
            place = end
    return random.Random(seed).sample(found, count)

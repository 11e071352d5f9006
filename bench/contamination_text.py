"""Real text, and questions of 4 to 13 words made of its words, for the tests and the benchmark."""

import json
import random
import re
from collections import Counter
from pathlib import Path

from ropewalk.clean.contamination import EvaluationItem

# The wording of stems in MMLU and its like; the number of words is that of the stem with its fillings.
STEMS = [
    "What is a {n}?", "Who was {N}?", "What causes {n} {n}?", "The {n} of a {n} is", "Where was {N} born?",
    "Which of these is a {n}?", "When did {N} become {n}?", "A {n} is best defined as",
    "Which of the following best describes a {n}?", "What is the main function of the {n}?",
    "The process of {n} in the {n} is known as", "According to {N}, what is the purpose of {n}?",
    "In which year did {N} first {n} the {n}?", "Which of the following is a {n} of {n}?",
    "Which of the following statements about {n} is true?",
]  # fmt: skip

WRITINGS = {
    "as it is": lambda s: s,
    "lower case": str.lower,
    "upper case": str.upper,
    "punctuation left out": lambda s: re.sub(r"[^\w\s]", "", s),
    "punctuation as spaces": lambda s: re.sub(r"[^\w\s]", " ", s),
    "broken lines": lambda s: s.replace(" ", "\n  "),
}
"""How copies differ without being other questions."""


def unrelated(shared: Path, size: int = 2700) -> list[str]:
    """PEPs, the Rust book, WikiText and Shakespeare in documents of `size` characters: about 7,500."""
    data = shared / "data"
    whole = []
    for name in ("peps", "rust_book"):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        whole += [json.loads(line)["text"] for line in lines]
    names = ("tinyshakespeare", "wikitext2_valid", "wikitext2_test")
    whole += [(data / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    return [text[i : i + size] for text in whole for i in range(0, len(text), size)]


def gsm8k(shared: Path, part: str = "test") -> list[EvaluationItem]:
    lines = (shared / "data" / f"gsm8k_{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [EvaluationItem("gsm8k", str(i), row["question"], row["answer"]) for i, row in enumerate(rows)]


def short_questions(documents: list[str], count: int, rng: random.Random) -> list[EvaluationItem]:
    """Different questions with four choices, filled with words and names of the documents themselves."""
    text = " ".join(documents)
    words = Counter(re.findall(r"\b[a-z]{4,12}\b", text))
    nouns = sorted(word for word, often in words.items() if 5 <= often <= 150)
    names = sorted(set(re.findall(r"\b[A-Z][a-z]{3,9} [A-Z][a-z]{3,9}\b", text)))
    items: dict[str, EvaluationItem] = {}
    while len(items) < count:
        stem = re.sub(r"\{n\}", lambda _: rng.choice(nouns), rng.choice(STEMS))
        question = re.sub(r"\{N\}", lambda _: rng.choice(names), stem)
        choices = tuple(f"{rng.choice(nouns)} {rng.choice(nouns)}" for _ in range(4))
        items.setdefault(
            question, EvaluationItem("short", str(len(items)), question, rng.choice(choices), choices)
        )
    return list(items.values())


def insert(document: str, passage: str, rng: random.Random) -> str:
    """At a random space: in the middle of a sentence, with nothing to mark it."""
    places = [match.start() for match in re.finditer(" ", document)] or [len(document)]
    at = rng.choice(places)
    return f"{document[:at]} {passage}{document[at:]}"


_SYNONYMS = {
    word: other
    for word, other in (
        pair.split(":")
        for pair in (
            "many:numerous buys:purchases bought:purchased gives:hands total:overall each:every house:home "
            "makes:produces week:fortnight has:owns does:did kids:children big:large sells:trades "
            "left:remaining eats:consumes gets:receives money:cash car:vehicle friend:pal "
            "takes:needs store:shop works:labors number:count together:combined day:morning"
        ).split()
    )
}


def _reordered(text: str, rng: random.Random) -> str:
    parts = re.split(r"(?<=[.?!,])\s+", text)
    if len(parts) < 2:
        words = text.split()
        return " ".join(words[len(words) // 2 :] + words[: len(words) // 2])
    rng.shuffle(parts)
    return " ".join(parts)


PARAPHRASES = {
    "synonyms": lambda s, _: re.sub(r"\w+", lambda m: _SYNONYMS.get(m[0].lower(), m[0]), s),
    "other numbers": lambda s, rng: re.sub(r"\d+", lambda _: str(rng.randint(2, 99)), s),
    "other order": _reordered,
}
"""Light paraphrases, made by rule: real ones are harder."""

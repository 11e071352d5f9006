"""Evaluation items in training texts, beside datatrove's n-gram decontamination: documents a second of one
processor, and how much is found of what was put there. Run by data.py.

14,000 short questions in the wording of MMLU and GSM8K's test set are looked for in documents of 2.7 kB: in
unrelated ones, and in some with a question at a random space, as it is or in another writing. datatrove is
given n-grams of 13 words of the questions (its default takes only those that reach into the answer); with its
own words (spaCy's English rules), and once more with words split at white space, which it does not offer.
"""

import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contamination_text import WRITINGS, gsm8k, insert, short_questions, unrelated
from environments import peer_python
from measure import Measurement, interleave, measure

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
RUNS, UNRELATED, SHORT, LONG = 3, 2000, 500, 200
ITEMS = 14_000


def documents(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(items, documents); a document's `kind` is what was put into it: short, long or nothing."""
    whole = unrelated(SHARED)
    short, long = short_questions(whole, ITEMS, rng), gsm8k(SHARED)
    found = [{"kind": "unrelated", "text": text} for text in rng.sample(whole, UNRELATED)]
    for kind, items, count in (("short", short, SHORT), ("long", long, LONG)):
        for item in rng.sample(items, count):
            write = rng.choice(list(WRITINGS.values()))
            found.append({"kind": kind, "text": insert(rng.choice(whole), write(item.question), rng)})
    rng.shuffle(found)
    asked = [
        {"set": i.set, "id": i.id, "question": i.question, "answer": i.answer, "choices": i.choices}
        for i in (*short, *long)
    ]
    return asked, found


def cases(directory: Path) -> list[dict[str, Any]]:
    """See data.py. Speed is without imports and without making the index."""
    items, texts = documents(random.Random(0))
    job = directory / "job.json"
    job.write_text(json.dumps({"items": items, "texts": [one["text"] for one in texts]}))
    datatrove = peer_python("datatrove", HERE)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def side(name: str, python: Path | str, words: str = "") -> Measurement:
        program = HERE / "sides" / f"contamination_{name.partition('-')[0]}.py"
        return measure(name, [python, program, job, directory / name, words], threads)

    runs = interleave(
        RUNS,
        {
            "ropewalk": lambda: side("ropewalk", sys.executable),
            "datatrove": lambda: side("datatrove", datatrove),
            "datatrove-split": lambda: side("datatrove-split", datatrove, "split"),
        },
    )
    kinds = [one["kind"] for one in texts]
    found = []
    for peer in ("datatrove", "datatrove-split"):
        ours, theirs = _figures(runs, "ropewalk", kinds), _figures(runs, peer, kinds)
        found += [
            {
                "case": case,
                "peer": peer,
                "ours": ours[case],
                "peer_value": theirs[case],
                "unit": "documents/s/core" if case == "contamination" else "share",
                "ratio": ours[case] / max(theirs[case], 1e-3),
            }
            for case in ours
        ]
    return found


def _figures(runs: Sequence[Measurement], side: str, kinds: Sequence[str]) -> dict[str, float]:
    """Speed, the shares found of what was put there, and the share of unrelated documents left alone."""
    own = [run for run in runs if run.side == side]
    found = set(own[0].result["found"])
    share = {
        kind: statistics.fmean(i in found for i, one in enumerate(kinds) if one == kind)
        for kind in set(kinds)
    }
    return {
        "contamination": len(kinds) / statistics.median(run.result["processor_seconds"] for run in own),
        "contamination: found, 4 to 12 words": share["short"],
        "contamination: found, GSM8K": share["long"],
        "contamination: unrelated left alone": 1 - share["unrelated"],
    }

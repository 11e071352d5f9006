"""Attention of tokens that several processes share is that of one process, and so are its gradients."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ropewalk.parallel.launch import launch

ALLOWED = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 5e-2}


def random_case(number: int, degree: int) -> dict[str, Any]:
    """A kind, a packing and a form of attention, each drawn anew."""
    draw = random.Random(number)
    kind = draw.choice(("all_gather", "ring", "ulysses"))
    kv_heads = draw.choice((degree, 2 * degree) if kind == "ulysses" else (1, 2, 3))
    length = 2 * degree * draw.choice((3, 8, 33))
    return {
        "seed": number,
        "kind": kind,
        "dtype": draw.choice(("float64", "float64", "float32", "bfloat16")),
        "rows": draw.choice((1, 2, 3)),
        "length": length,
        "longest": draw.choice((3, length // 2, 4 * length)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw.choice((1, 2, 3)),
        "window": draw.choice((None, None, 1, 5, 17)),
        "softcap": draw.choice((None, None, 2.0)),
        "scale": draw.choice((None, 0.7)),
    }


@pytest.mark.parametrize("degree", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_divided_attention_is_attention(degree: int, tmp_path: Path) -> None:
    """Every kind of exchange, with random packings, windows, soft-caps and grouped heads."""
    cases = [random_case(number, degree) for number in range(120)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("attention_worker.py")
    assert launch([str(worker), str(tmp_path / "cases.json")], degree) == 0
    results = json.loads((tmp_path / "cases.result").read_text())
    for case, differences in zip(cases, results, strict=True):
        assert max(differences) < ALLOWED[case["dtype"]], (case, differences)

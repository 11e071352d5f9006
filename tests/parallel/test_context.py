"""Attention of tokens that several processes share is that of one process, and so are its gradients."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ropewalk as rw
from ropewalk.errors import UserError
from ropewalk.layout import Layout
from ropewalk.model import from_config
from ropewalk.ops import AttentionLayout, RowPart, attention_reference
from ropewalk.parallel import context_refusal
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


def bytes_sent(case: dict[str, Any], degree: int) -> int:
    """The closed forms of docs/parallelism.md, forward and backward."""
    tokens = case["rows"] * case["length"] // degree
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[case["dtype"]]
    heads, kv, wide = case["heads"] * 8, 2 * case["kv_heads"] * 8, max(size, 4)
    if case["kind"] == "ulysses":
        return 2 * (degree - 1) * tokens * (2 * heads + kv) * size // degree
    gradients = degree - 1 if case["kind"] == "all_gather" else degree
    return 2 * (degree - 1) * tokens * kv * size + gradients * tokens * kv * wide


@pytest.mark.parametrize("degree", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_divided_attention_is_attention(degree: int, tmp_path: Path) -> None:
    """Every kind of exchange, with random packings, windows, soft-caps and grouped heads; and it sends what
    the documentation says."""
    cases = [random_case(number, degree) for number in range(120)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("attention_worker.py")
    assert launch([str(worker), str(tmp_path / "cases.json")], degree) == 0
    results = json.loads((tmp_path / "cases.result").read_text())
    for case, differences in zip(cases, results, strict=True):
        *differences, sent = differences
        assert max(differences) < ALLOWED[case["dtype"]], (case, differences)
        assert sent == bytes_sent(case, degree), case


SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
}


def test_a_part_has_the_positions_and_frequencies_of_the_whole_rows() -> None:
    """Dynamic frequencies depend on the longest document, which here is in the other part. The first half of
    a row needs nothing from the second, so that it can be compared without another process."""
    model = from_config(SIZES | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, seed=1)
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(2))
    segments = torch.tensor([[0] * 5 + [1] * 27, [0] * 20 + [1] * 8 + [-1] * 4])
    at = torch.arange(32)
    positions = at - torch.tensor([[0] * 5 + [5] * 27, [0] * 20 + [20] * 8 + [28] * 4])
    wanted = model(tokens, positions=positions, segments=segments)[:, :16]

    def attention(q: Tensor, k: Tensor, v: Tensor, *, layout: AttentionLayout, **options: Any) -> Tensor:
        options.pop("prefix")
        return attention_reference(q, k, v, layout.segments(2, q.device)[:, :16], **options)

    model.row_part = RowPart(lambda length: at[: length // 2], attention, lambda x: x)
    found = model(tokens[:, :16], positions=positions[:, :16], segments=segments)
    torch.testing.assert_close(found, wanted)
    model.row_part = None
    apart = model(tokens[:, :16], positions=positions[:, :16], segments=segments[:, :16])
    assert (apart - wanted).abs().max() > 1e-4  # so the frequencies were others


def test_ulysses_wants_heads_to_share_out() -> None:
    config = from_config(SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}, seed=0).config
    assert context_refusal(config, Layout(shard=1, context=4, context_exchange="ulysses")) is None
    assert context_refusal(config, Layout(shard=1, context=3)) is None  # the other kinds do not
    why = context_refusal(config, Layout(shard=1, context=3, context_exchange="ulysses"))
    assert why == (
        "ulysses shares out the key-value heads, and 3 does not divide 4; "
        "set parallel.context: 2, or parallel.context_exchange: all_gather"
    )
    why = context_refusal(config, Layout(shard=1, context=4, tensor=2, context_exchange="ulysses"))
    assert why is not None
    assert "4 does not divide 4 over parallel.tensor 2; set parallel.context: 2" in why


def test_what_cannot_be_divided_is_said_before_a_process_starts(make_recipe: Any) -> None:
    recipe = make_recipe(batch_size=4)
    heads = recipe | {"parallel": {"context": 3, "context_exchange": "ulysses"}}
    heads["data"] = heads["data"] | {"sequence_length": 96}
    with pytest.raises(UserError, match=r"parallel.context: ulysses .* set parallel.context: [12]"):
        rw.train(heads, progress=False)
    odd = recipe | {"parallel": {"context": 3}}
    odd["data"] = odd["data"] | {"sequence_length": 64}
    with pytest.raises(UserError, match=r"rows of 64 tokens .* 6 equal .* set it to 2, or .*length: 66"):
        rw.train(odd, progress=False)

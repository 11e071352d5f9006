"""The self-check passes what is right in every dtype, finds what is wrong, names it, and leaves no trace."""

import importlib

import pytest
import torch

import ropewalk.model.transformer as transformer
import ropewalk.ops.lora as lora_module
from ropewalk.data import Batch
from ropewalk.errors import RopewalkError
from ropewalk.model import from_config
from ropewalk.ops import AttentionLayout, using_references
from ropewalk.train.activations import save_activations
from ropewalk.train.self_check import fold, sample, self_check, unpacked

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
loss_module = importlib.import_module("ropewalk.ops.linear_cross_entropy")  # a function has its name


def make(family="llama", dtype=torch.float32, lora=False):
    model = from_config({**BASE, **FAMILIES[family]}, seed=0).to(dtype)
    if lora:
        adapted(model)
    return model.train()


def adapted(model):
    from ropewalk.adapt import AdapterConfig, apply_adapter

    apply_adapter(model, AdapterConfig("lora", rank=4), seed=0)


def packed(rows=2, length=96, seed=0) -> Batch:
    """Documents of 5 to 40 tokens, every token but the last of each scored, padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 128, (rows, length), generator=generator)
    segments, positions = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for row in range(rows):
        at = number = 0
        while at < length - 10:
            count = min(length - 4 - at, int(torch.randint(5, 40, (1,), generator=generator)))
            segments[row, at : at + count] = number
            positions[row, at : at + count] = torch.arange(count)
            labels[row, at : at + count - 1] = tokens[row, at + 1 : at + count]
            at, number = at + count, number + 1
    return Batch(tokens, labels, positions, segments)


def check(model, batch=None, tokens=128):
    return self_check(model, packed() if batch is None else batch, chunk=16, tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_passes(family, dtype, lora):
    found = check(make(family, dtype, lora))
    assert found.documents >= 2
    assert found.difference < (1e-5 if dtype == torch.float32 else 0.05)
    assert "fused = reference" in str(found)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_are_part_of_what_is_checked(mode):
    model = make()
    save_activations(model, mode)
    assert check(model).difference < 1e-5
    assert model.run_block is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_that_see_each_other_are_found_and_the_module_is_named(monkeypatch, dtype):
    def leaking(q, k, v, *, layout, **options):
        if using_references():
            return right(q, k, v, layout=layout, **options)
        return right(q, k, v, layout=AttentionLayout.rows(*q.shape[:2]), **options)

    right = transformer.attention
    monkeypatch.setattr(transformer, "attention", leaking)
    with pytest.raises(
        RopewalkError, match=r"the plain formulas .* begins in the module blocks\.0\.attention"
    ):
        check(make(dtype=dtype))


def test_a_wrong_mask_in_both_is_found_by_the_documents_alone(monkeypatch):
    def leaking(q, k, v, *, layout, **options):
        whole = AttentionLayout.rows(*q.shape[:2])
        return right(q, k, v, layout=whole if len(layout.runs) > 1 and len(q) == 1 else layout, **options)

    right = transformer.attention
    monkeypatch.setattr(transformer, "attention", leaking)
    with pytest.raises(RopewalkError, match="packed in one row"):
        check(make())


def test_a_lost_gradient_term_is_found_though_the_loss_is_right(monkeypatch):
    def lost(ctx, slope):
        d_x, *rest = right(ctx, slope)
        return None if d_x is None else d_x * 0.5, *rest

    right = lora_module._LoraLinear.backward
    monkeypatch.setattr(lora_module._LoraLinear, "backward", staticmethod(lost))
    with pytest.raises(RopewalkError, match=r"it begins in the gradient of blocks\.\d"):
        check(make(lora=True))


def test_the_gradient_of_a_matrix_beside_a_zero_one_is_checked(monkeypatch):
    """LoRA begins with B = 0, where the gradient of A is 0 whatever it should be."""

    def lost(ctx, slope):
        d_x, w, b, d_a, *rest = right(ctx, slope)
        return d_x, w, b, None if d_a is None else d_a * -1, *rest

    right = lora_module._LoraLinear.backward
    monkeypatch.setattr(lora_module._LoraLinear, "backward", staticmethod(lost))
    with pytest.raises(RopewalkError, match="lora_a"):
        check(make(lora=True))


def test_a_wrong_loss_is_found(monkeypatch):
    def generous(*arguments, **options):
        return right(*arguments, **options) * 0.9

    right = loss_module.cross_entropy_rows
    monkeypatch.setattr(loss_module, "cross_entropy_rows", generous)
    with pytest.raises(RopewalkError, match="the plain formulas"):
        check(make())


def test_nothing_is_left_behind():
    model = make(lora=True)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.25
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    check(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert {m.dropout for m in model.modules() if isinstance(getattr(m, "dropout", None), float)} == {0.25}
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not using_references()


def test_a_loss_that_is_not_finite_is_left_to_the_first_step():
    model = make()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    batch = packed()
    batch.tokens[:] = 3
    assert check(model, batch) is None


def test_the_sample_is_short_and_holds_scored_documents():
    batch = packed(rows=4)
    batch.labels[0] = -100
    found = sample(batch, 64)
    assert found.tokens.shape == (1, 64)
    assert int((found.segments[0] == 0).sum()) <= 32
    assert bool((found.labels != -100).any())
    assert set(found.segments[0].tolist()) == set(range(int(found.segments.max()) + 1))
    for limit in (33, 47, 63):  # float8 takes a multiple of 16 tokens
        assert sample(batch, limit).tokens.shape[1] % 16 == 0
    batch.labels[:] = -100
    assert bool((sample(batch, 64).labels != -100).all())


def test_documents_alone_are_those_that_were_packed():
    row = sample(packed(), 90)
    alone = unpacked(row)
    assert alone.tokens.shape[1] % 16 == 0
    for name in ("tokens", "labels", "positions"):
        real = alone.segments >= 0
        assert torch.equal(getattr(alone, name)[real], getattr(row, name)[0])
    assert torch.equal(alone.positions[:, 0], torch.zeros(len(alone.tokens), dtype=torch.long))


@pytest.mark.parametrize("size", [1, 4095, 4096, 10_000])
def test_every_value_counts_once_in_a_fold(size):
    values = torch.zeros(size, dtype=torch.float64)
    for place in {0, size // 2, size - 1}:
        changed = values.clone()
        changed[place] = 1.0
        assert fold(changed).sum() == 1.0
        assert fold(changed).count_nonzero() == 1

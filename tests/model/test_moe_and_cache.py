"""The router's loss is transformers'; caches and learned positions say where they end."""

import pytest
import torch

from ropewalk.errors import RopewalkError, UserError
from ropewalk.model import KVCache, from_config
from ropewalk.model.moe import MixtureOfExperts, copies, load_balancing_loss, sums
from ropewalk.train.activations import save_activations

MOE = [
    "mixtral-grouped",
    "mixtral-window",
    "mixtral-even",
    "qwen3_moe-grouped",
    "qwen3_moe-sparse",
    "qwen3_moe-tied",
]


def auxiliary(model, tokens, **arguments):
    model.train()
    try:
        model(tokens, **arguments)
        return model.auxiliary_loss()
    finally:
        model.eval()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("case", MOE)
def test_load_balancing_loss_equals_transformers(make_pair, case, checkpointing):
    """Values, gradients of the router, and padding left out."""
    pair = make_pair(case)
    tokens, config = pair.tokens(), pair.ours.config
    save_activations(pair.ours, checkpointing)
    for mask in (torch.ones_like(tokens), (torch.arange(21) < torch.tensor([[21], [13]])).long()):
        outputs = pair.theirs(tokens, attention_mask=mask, output_router_logits=True)
        loss = auxiliary(pair.ours, tokens, segments=torch.where(mask.bool(), 0, -1))
        torch.testing.assert_close(loss, outputs.aux_loss * config.router_aux_loss_coef, atol=0, rtol=1e-5)
        loss.backward()
        (outputs.aux_loss * config.router_aux_loss_coef).backward()
        layer = config.moe_layers[0]
        theirs = dict(pair.theirs.named_parameters())[f"model.layers.{layer}.mlp.gate.weight"].grad
        torch.testing.assert_close(
            pair.ours.blocks[layer].mlp.router.weight.grad, theirs, atol=1e-8, rtol=1e-3
        )
        pair.ours.zero_grad()
        pair.theirs.zero_grad()
    save_activations(pair.ours, "none")


def test_no_loss_without_experts_or_training(make_pair):
    dense, moe = make_pair("llama-grouped").ours, make_pair("mixtral-even").ours
    assert auxiliary(dense, torch.ones(1, 3, dtype=torch.int64)) is None
    moe.eval()
    moe(torch.ones(1, 3, dtype=torch.int64))
    assert moe.auxiliary_loss() is None


def test_an_even_load_has_the_smallest_loss():
    even = (torch.full((4,), 2.0), torch.full((4,), 4.0))  # 8 tokens, two experts each
    uneven = (torch.tensor([5.0, 1.0, 1.0, 1.0]), torch.tensor([8.0, 4.0, 2.0, 2.0]))
    assert load_balancing_loss([even], 8).item() == pytest.approx(2.0)
    assert load_balancing_loss([uneven], 8) > load_balancing_loss([even], 8)


def test_what_eight_experts_give_a_token_is_rounded_once():
    """In every order the same, forward and (a row's copies') backward; the one is the other's gradient."""
    torch.manual_seed(0)
    pairs, row = torch.randn(30 * 8, 16).bfloat16(), torch.arange(30).repeat_interleave(8)
    exact = torch.zeros(30, 16, dtype=torch.float64).index_add_(0, row, pairs.double()).bfloat16()
    for _ in range(2):
        order = torch.randperm(30 * 8)
        assert torch.equal(sums(pairs[order], order, 8), exact)
        rows = torch.zeros(30, 16, dtype=torch.bfloat16, requires_grad=True)
        (gradient,) = torch.autograd.grad(copies(rows, order, 8), rows, pairs[order])
        assert torch.equal(gradient, exact)
    for function, count in ((copies, 3), (sums, 6)):
        inputs = torch.randn(count, 2, dtype=torch.float64, requires_grad=True)
        order = torch.randperm(6)
        assert torch.autograd.gradcheck(lambda x, f=function, o=order: f(x, o, 2), inputs)


def test_experts_that_no_token_chose_cost_nothing_and_do_no_harm(make_pair):
    layer = make_pair("mixtral-grouped").ours.blocks[0].mlp
    assert isinstance(layer, MixtureOfExperts)
    out, (_, counts) = layer(torch.randn(1, 1, 24, generator=torch.manual_seed(0)), None)
    assert counts.sum() == layer.top_k
    assert (counts == 0).any()
    assert out.isfinite().all()


def small_model():
    fields = {"model_type": "llama", "vocab_size": 17, "hidden_size": 8, "intermediate_size": 8}
    return from_config(fields | {"num_hidden_layers": 1, "num_attention_heads": 2}, seed=0).eval()


def small_gpt2():
    """A model of five learned positions."""
    fields = {
        "model_type": "gpt2",
        "vocab_size": 17,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 5,
    }
    return from_config(fields, seed=0).eval()


def test_a_full_cache_says_so():
    model = small_model()
    cache = KVCache(model.config, 1, 4)
    model(torch.ones(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(RopewalkError, match=r"holds 4 tokens; 5 are needed"):
        model(torch.ones(1, 2, dtype=torch.int64), cache=cache)
    assert cache.length == 3


def test_misuse_of_a_cache_is_refused():
    model = small_model()
    cache, tokens = KVCache(model.config, 2, 4), torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="segments"):
        model(tokens, segments=torch.zeros_like(tokens), cache=cache)
    with pytest.raises(ValueError, match="2 rows"):
        model(tokens[:1], cache=cache)
    with pytest.raises(ValueError, match="one row"):
        cache.expand(3)


def test_learned_positions_end_with_a_message():
    model = small_gpt2()
    model(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(UserError, match="only 5 positions"):
        model(torch.ones(1, 6, dtype=torch.int64))
    cache = KVCache(model.config, 1, 9)
    model(torch.ones(1, 5, dtype=torch.int64), cache=cache)
    with pytest.raises(UserError, match="only 5 positions"):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)


def test_a_packed_row_longer_than_the_learned_positions_is_fine():
    """What counts is the longest document, not the row."""
    model = small_gpt2()
    segments = torch.tensor([[0] * 4 + [1] * 5])
    out = model(torch.arange(9)[None], segments=segments)
    torch.testing.assert_close(out[:, 4:], model(torch.arange(4, 9)[None]), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_longrope_reads_again_when_it_outgrows_its_first_context(make_pair):
    """Also for ragged rows: afterwards every cached key is as if the longer context had been known."""
    pair = make_pair("phi3-longrope-long")  # original context: 8 tokens
    tokens = pair.tokens(2, 10)
    padded, positions = tokens[:, :7].clone(), torch.arange(7).repeat(2, 1)
    padded[1, :2], positions[1] = 0, torch.tensor([-1, -1, 0, 1, 2, 3, 4])
    cache = KVCache(pair.ours.config, 2, 12)
    pair.ours(padded, positions, cache=cache)
    for step in range(7, 10):
        last = pair.ours.logits(pair.ours(tokens[:, step : step + 1], cache=cache))
    torch.testing.assert_close(last[0], pair.theirs(tokens[:1]).logits[0, -1:], atol=1e-4, rtol=0)

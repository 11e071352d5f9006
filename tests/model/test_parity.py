"""Every family's logits, gradients and cached decoding equal transformers'."""

import copy

import pytest
import torch

from ropewalk.model import KVCache, from_config, load_model
from ropewalk.model.families import FAMILIES
from ropewalk.model.families_weights import stored_name, weight_map
from ropewalk.train.activations import save_activations

TOLERANCE = 1e-4


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance


def logits_of(model, tokens, positions=None, **arguments):
    return model.logits(model(tokens, positions, **arguments))


@torch.no_grad()
def test_logits_equal_transformers(pair):
    """Also for a batch of one and lengths that differ from the window and the original context."""
    for batch, length in ((2, pair.length), (1, 5), (3, 1)):
        tokens = pair.tokens(batch, length, seed=length)
        expected = pair.theirs(tokens).logits
        assert expected.abs().max() > 0.5, "logits too small for the tolerance to mean anything"
        close(logits_of(pair.ours, tokens), expected)


def test_every_family_has_cases(request):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("cases", request.path.parent / "conftest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    counts = [sum(kind == family for kind, _ in module.CASES.values()) for family in FAMILIES]
    assert min(counts) >= 3


def test_gradients_equal_transformers(pair):
    tokens = pair.tokens()
    weights = torch.randn(*tokens.shape, pair.ours.config.vocab_size, generator=torch.manual_seed(1))
    (pair.theirs(tokens).logits * weights).mean().backward()
    (logits_of(pair.ours, tokens) * weights).mean().backward()
    if pair.ours.config.moe_layers:
        _compare_expert_gradients(pair)
    else:
        config = pair.ours.config
        expected = {stored_name(config, n): p.grad for n, p in pair.theirs.named_parameters()}
        mine = dict(pair.ours.named_parameters())
        for rule in weight_map(config):
            for part, gradient in zip(rule.parts, rule.split(expected[rule.hf]), strict=True):
                close(mine[part].grad, gradient, 1e-5)
    pair.theirs.zero_grad()
    pair.ours.zero_grad()


def _compare_expert_gradients(pair):
    """transformers keeps experts in one tensor in memory."""
    theirs, mine = dict(pair.theirs.named_parameters()), dict(pair.ours.named_parameters())
    close(mine["embed.weight"].grad, theirs["model.embed_tokens.weight"].grad, 1e-5)
    for i in pair.ours.config.moe_layers:
        prefix = f"model.layers.{i}.mlp"
        close(mine[f"blocks.{i}.mlp.router.weight"].grad, theirs[f"{prefix}.gate.weight"].grad, 1e-5)
        for e in range(pair.ours.config.num_experts):
            gate, up = theirs[f"{prefix}.experts.gate_up_proj"].grad[e].chunk(2)
            down = theirs[f"{prefix}.experts.down_proj"].grad[e]
            for name, gradient in (("gate", gate), ("up", up), ("down", down)):
                ours = mine[f"blocks.{i}.mlp.experts.{e}.{name}_proj.weight"].grad
                close(torch.zeros_like(gradient) if ours is None else ours, gradient, 1e-5)


def test_bfloat16_is_no_further_from_float32_than_transformers(pair):
    """Logits and a gradient, relative to what float32 gives with the same (rounded) weights."""
    if pair.ours.config.moe_layers:
        pytest.skip("rounding sends some tokens to other experts")
    tokens, theirs = pair.tokens(8), copy.deepcopy(pair.theirs)
    ours = load_model(pair.path, dtype="bfloat16")
    exact = load_model(pair.path)
    weights = torch.randn(8, pair.length, ours.config.vocab_size, generator=torch.manual_seed(1))
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *exact.parameters()):
            parameter.copy_(parameter.bfloat16())
    theirs = theirs.bfloat16()
    logits = {}
    for name, model in (("theirs", theirs), ("ours", ours), ("exact", exact)):
        logits[name] = model(tokens).logits if name == "theirs" else logits_of(model, tokens)
        (logits[name].float() * weights).mean().backward()
    gradients = {
        "theirs": theirs.get_input_embeddings().weight.grad,
        "ours": ours.embed.weight.grad,
        "exact": exact.embed.weight.grad,
    }
    # Sums over 16 elements round more than those of real models, hence the slack in gradients.
    for values, slack in ((logits, 1.2), (gradients, 2.0)):
        errors = {n: (values[n].float() - values["exact"]).norm().item() for n in ("ours", "theirs")}
        assert errors["ours"] <= slack * errors["theirs"]


@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence(pair):
    """A prompt at once, then a chunk, then token by token, gives the logits of one forward."""
    if pair.name == "llama-dynamic":
        pytest.skip(
            "dynamic RoPE past its context changes old keys too; transformers' cache keeps them, as ours"
        )
    tokens = pair.tokens()
    length = tokens.shape[1]
    expected = pair.theirs(tokens).logits
    cache = KVCache(pair.ours.config, 2, length + 3)
    pieces = [tokens[:, :6], tokens[:, 6:9], *tokens[:, 9:].split(1, dim=1)]
    got = [logits_of(pair.ours, piece, cache=cache) for piece in pieces]
    assert cache.length == length
    # Where longrope switches, what came before was right for its length; the rest is as if read anew.
    start = 6 if pair.name == "phi3-longrope-long" else 0
    close(torch.cat(got, 1)[:, start:], expected[:, start:])


@torch.no_grad()
def test_truncated_and_expanded_caches_go_on_correctly(pair):
    tokens = pair.tokens(3)
    prefix, rest = tokens[:1, :4], tokens[:, 4:7]
    cache = KVCache(pair.ours.config, 1, 12)
    pair.ours(torch.cat((prefix, tokens[:1, 9:12]), 1), cache=cache)
    cache.truncate(4)
    cache = cache.expand(3)
    got = logits_of(pair.ours, rest, cache=cache)
    close(got, logits_of(pair.ours, torch.cat((prefix.expand(3, -1), rest), 1))[:, 4:])


@torch.no_grad()
def test_left_padded_rows_equal_the_rows_alone(pair):
    lengths, steps = (7, 3, 5), 2
    tokens = pair.tokens(3, 7 + steps)
    padded, positions = torch.zeros(3, 7, dtype=torch.int64), torch.full((3, 7), -1)
    for row, n in enumerate(lengths):
        padded[row, 7 - n :] = tokens[row, :n]
        positions[row, 7 - n :] = torch.arange(n)
    cache = KVCache(pair.ours.config, 3, 7 + steps)
    got = [logits_of(pair.ours, padded, positions, cache=cache)]
    for step in range(steps):
        new = torch.stack([tokens[row, n + step] for row, n in enumerate(lengths)])[:, None]
        got.append(logits_of(pair.ours, new, cache=cache))
    joined = torch.cat(got, 1)
    assert joined.isfinite().all()
    if pair.name in ("llama-dynamic", "phi3-longrope-long"):
        return  # their frequencies depend on the longest row
    for row, n in enumerate(lengths):
        close(joined[row, 7 - n :], logits_of(pair.ours, tokens[row : row + 1, : n + steps])[0])


def test_packed_documents_equal_separate_ones(pair):
    """Outputs and gradients; padding between and after documents does not matter."""
    lengths = (4, 4, 9, 1, 6)
    documents = [pair.tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    pad = torch.zeros(1, 3, dtype=torch.int64)
    rows = torch.cat([*documents[:3], pad, *documents[3:], pad, pad, pad, pad, pad[:, :1]], 1).view(2, 20)
    segments = torch.full_like(rows, -1)
    segments[0, :17] = torch.tensor([0] * 4 + [1] * 4 + [2] * 9)
    segments[1, :7] = torch.tensor([0] + [1] * 6)
    if pair.name in ("llama-dynamic", "phi3-longrope-long"):
        documents = documents[2:3]  # their frequencies depend on the longest document
        rows, segments = rows[:1, 8:], segments[:1, 8:]
    real = segments >= 0
    model = pair.ours
    outs = [logits_of(model, d).flatten(0, 1) for d in documents]
    (torch.cat(outs).square().mean()).backward()
    separate = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = logits_of(model, rows, segments=segments)[real]
    packed.square().mean().backward()
    close(packed, torch.cat(outs), 1e-5)
    for name, parameter in model.named_parameters():
        if name in separate:
            close(parameter.grad, separate[name], 1e-4)
    model.zero_grad()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_changes_no_gradient(pair, mode):
    model, tokens = pair.ours, pair.tokens()
    gradients = []
    model.train()
    for chosen in ("none", mode):
        save_activations(model, chosen)
        logits_of(model, tokens).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    save_activations(model, "none")
    model.eval()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.slow
def test_compiled_blocks_equal_plain_ones_and_serve_every_packing():
    """One compilation for all layers, batches and document boundaries."""
    from torch._dynamo.utils import counters

    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = from_config({"model_type": "llama"} | sizes | heads, seed=0).train()
    tokens = torch.randint(0, 31, (2, 24), generator=torch.manual_seed(0))
    packings = [torch.arange(24).expand(2, -1) // n for n in (5, 24, 3, 7)]
    plain = [model(tokens, segments=s) for s in packings]
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for segments, expected in zip(packings, plain, strict=True):
        out = model(tokens, segments=segments)
        close(out, expected, 1e-5)
        out.sum().backward()
        assert counters["frames"]["ok"] <= 5
    assert counters["frames"]["ok"] > 0
    torch._dynamo.reset()

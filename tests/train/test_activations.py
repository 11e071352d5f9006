"""Keeping less of a forward pass changes memory, nothing else: gradients stay the same to the last bit."""

import pytest
import torch

from ropewalk.model import Transformer, from_config
from ropewalk.train import activations
from ropewalk.train.activations import Offload, _kept_share, _within, save_activations

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model() -> Transformer:
    return from_config(CONFIG, seed=0).train()


def gradients(model: Transformer, rows: int = 2, length: int = 96) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    model(tokens).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def kept_bytes(model: Transformer) -> int:
    """Memory that is alive between forward and backward, beyond the parameters."""
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor):
        alive.append(tensor)
        return tensor

    tokens = torch.zeros(2, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens).sum()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for tensor in alive:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full"},
        {"mode": "selective"},
        {"mode": "full", "every": 2},
        {"mode": "selective", "every": 4},
        {"mode": "none", "budget": 0.2},
        {"mode": "none", "budget": 0.8},
        {"mode": "none", "budget": 0.0},
        {"mode": "none", "budget": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mode_gives_the_same_gradients(model, options, dtype):
    model.to(dtype)
    plain = gradients(model)
    save_activations(model, **options)
    saved = gradients(model)
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_every_nth_block_is_recomputed(model):
    assert save_activations(model, "full", every=3) == ("none", "none", "full") * 2
    assert save_activations(model, "none") == ("none",) * 6
    assert model.run_block is None


def test_a_budget_takes_the_cheap_mode_before_the_dear_one():
    assert _within(1.0, 6, 0.5) == ("none",) * 6
    assert _within(0.75, 6, 0.5).count("selective") == 3
    assert _within(0.5, 6, 0.5) == ("selective",) * 6
    assert _within(0.25, 6, 0.5).count("full") == 3
    assert set(_within(0.25, 6, 0.5)) == {"selective", "full"}
    assert _within(0.0, 6, 0.5) == ("full",) * 6


@pytest.mark.parametrize("selective", [0.31, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.33, 0.5, 0.9, 1.0])
def test_a_budget_is_kept(budget, selective):
    share = {"none": 1.0, "selective": selective, "full": 0.0}
    for count in (1, 2, 7, 30):
        kept = sum(share[mode] for mode in _within(budget, count, selective)) / count
        assert kept <= budget + 1e-9
        assert kept > budget - 1.0 / count - 1e-9


def test_what_selective_keeps_is_counted(model):
    """By hand, in values per token: q, k, v, attention, its logsumexp, o, gate, up, down."""
    kept = 64 + 32 + 32 + 64 + 64 + 160 + 160 + 64 + 4
    share = _kept_share(model)
    # everything: those, and the block's input, norms, rotated q and k, the product with up, and without a
    # kernel for both at once silu(gate)
    assert 0.4 < share < 0.75
    everything = kept / share
    assert 64 * 5 + 32 * 2 + 160 * 3 < everything < 64 * 12 + 32 * 6 + 160 * 6
    assert gradients(model)  # the model still trains, and nothing was left on it
    assert model.run_block is None


def test_less_is_kept(model):
    everything = kept_bytes(model)
    save_activations(model, "full")
    assert kept_bytes(model) < 0.1 * everything
    save_activations(model, "full", every=2)
    assert 0.4 * everything < kept_bytes(model) < 0.6 * everything


@pytest.mark.parametrize("frozen", [False, True])
def test_offloaded_inputs_give_the_same_gradients(model, frozen):
    """The path of a GPU, with host memory on both ends: no streams, the same copies and hand-overs. As with
    LoRA the first block's input, and norms, may need no gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "proj" in name)
    plain = gradients(model)
    offload = Offload(torch.device("cpu"))
    model.run_block = offload.run
    for _ in range(2):
        saved = gradients(model)
        assert all(torch.equal(plain[name], saved[name]) for name in plain)
        assert offload.copies == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu_takes_less_memory(model):
    model.cuda()

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        tokens = torch.zeros(8, 512, dtype=torch.long, device="cuda")
        model(tokens).sum().backward()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated()

    save_activations(model, "full")
    on_device = peak()
    save_activations(model, "full", offload=True)
    assert peak() < on_device


def test_long_rows_go_through_the_mlp_in_tiles(model, monkeypatch):
    """The same gradients, and of the MLP's activations only a tile's are there at once."""
    plain = gradients(model)
    monkeypatch.setattr(activations, "_TILE", 16)
    save_activations(model, "full")
    rows = []
    for block in model.blocks:
        block.mlp.up_proj.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[1]))
    tiled = gradients(model)
    assert set(rows) == {16}
    for name, gradient in plain.items():
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-4, atol=1e-4)
    save_activations(model, "selective")
    assert model.blocks[0].tile is None


def test_host_memory_is_used_again_by_shorter_and_longer_rows(model):
    offload = Offload(torch.device("cpu"))
    model.run_block = offload.run
    for length in (64, 32, 96):
        saved = gradients(model, length=length)
        model.run_block = None
        plain = gradients(model, length=length)
        assert all(torch.equal(plain[name], saved[name]) for name in plain)
        model.run_block = offload.run
        assert len(offload.spare) == 6

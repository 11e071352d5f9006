"""Training on a GPU: the CPU's losses, whatever is saved, moved, compiled or replayed; and exact resumes."""

import shutil

import pytest
import torch

import ropewalk as rw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(recipe, device):
    recipe["train"]["device"] = device
    return rw.train(recipe, progress=False)


HALF = dict(precision="bfloat16")
EVERY_WEIGHT = {
    "float32": {},
    "bfloat16": HALF,
    "full checkpointing": dict(checkpointing="full", **HALF),
    "selective": dict(checkpointing="selective", **HALF),
    "budget": dict(checkpointing_budget=0.4, **HALF),
    "activations offloaded": dict(checkpointing="full", activation_offload=True, **HALF),
    "states offloaded": dict(optimizer={"offload": True}, **HALF),
    "in backward": dict(clip=0.0, micro_batch_size=4, optimizer={"in_backward": True}),
    "stochastic rounding": dict(optimizer={"masters": False}, **HALF),
    "8 bits": dict(optimizer={"state_bits": 8}),
    "4 bits": dict(optimizer={"state_bits": 4}),
    "lion": dict(optimizer={"name": "lion", "learning_rate": 1e-3}),
    "muon": dict(optimizer={"name": "muon"}),
    "adafactor": dict(optimizer={"name": "adafactor"}),
}
ADAPTED = {
    method: dict(adapt={"method": method})
    for method in ("lora", "dora", "prompt", "prefix", "bottleneck", "ia3")
} | {
    "qlora": dict(adapt={"method": "lora", "quantize": "nf4"}),
    "lora on int8": dict(adapt={"method": "lora", "quantize": "int8"}),
    "lora on int8 in bfloat16": dict(
        adapt={"method": "lora", "quantize": "int8"}, checkpointing="full", **HALF
    ),
    "qlora in bfloat16": dict(adapt={"method": "lora", "quantize": "nf4"}, checkpointing="full", **HALF),
    "qlora, activations offloaded": dict(
        adapt={"method": "lora", "quantize": "nf4"}, checkpointing="full", activation_offload=True, **HALF
    ),
    "prefix in bfloat16": dict(adapt={"method": "prefix"}, **HALF),
}


@pytest.mark.parametrize("name", EVERY_WEIGHT | ADAPTED)
def test_the_losses_are_those_of_the_cpu(make_recipe, name):
    fields = (EVERY_WEIGHT | ADAPTED)[name]
    here = train(make_recipe(steps=5, **fields), "cpu")
    there = train(make_recipe(steps=5, **fields), "cuda")
    near = 0.03 if "precision" in fields else 0.01 if "bits" in name or name == "muon" else 1e-3
    assert there.losses == pytest.approx(here.losses, rel=near)


@pytest.mark.parametrize("name", ["float32", "states offloaded", "stochastic rounding", "8 bits", "qlora"])
def test_a_resumed_run_is_the_uninterrupted_one(make_recipe, name):
    recipe = make_recipe(steps=6, checkpoint_every=3, keep=9, **(EVERY_WEIGHT | ADAPTED)[name])
    whole = train(recipe, "cuda")
    shutil.rmtree(whole.run / "checkpoints" / "step-00000006")
    (whole.run / "report.md").unlink()
    assert rw.resume(whole.run, progress=False).losses == pytest.approx(whole.losses[3:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cuda_graphs": True},
        {"adapt": {"method": "lora", "quantize": "nf4"}, "checkpointing": "full"},
        {"adapt": {"method": "lora", "quantize": "int8"}},
    ],
    ids=str,
)
def test_compiled_is_as_written(make_recipe, tmp_path, monkeypatch, fields):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    plain = dict(fields)
    plain.pop("cuda_graphs", None)
    written = train(make_recipe(steps=4, **HALF, **plain), "cuda")
    compiled = train(make_recipe(steps=4, compile=True, **HALF, **fields), "cuda")
    assert compiled.losses == pytest.approx(written.losses, rel=0.01)


@pytest.mark.slow
def test_float8_learns_as_bfloat16_does(make_recipe, tmp_path):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8")
    shape = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 2}
    config = {**shape, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 512}
    model = {"config": config, "tokenizer": make_recipe()["model"]["source"]}
    losses = {
        precision: train(
            make_recipe(steps=4, model=model, precision=precision, optimizer={"learning_rate": 1e-4}), "cuda"
        ).losses
        for precision in ("bfloat16", "float8")
    }
    assert losses["float8"] == pytest.approx(losses["bfloat16"], rel=0.03)


def test_loading_onto_the_gpu_and_generating_is_as_on_the_cpu(tiny_llama_dir):
    tokens = torch.randint(0, 64, (2, 30))
    here, there = (rw.load_model(tiny_llama_dir, device=device) for device in ("cpu", "cuda"))
    with torch.inference_mode():
        expected = here.logits(here(tokens))
        found = there.logits(there(tokens.cuda()))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)

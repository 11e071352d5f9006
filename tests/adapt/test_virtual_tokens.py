"""Virtual tokens stand before every document: packed, cached, generated, recomputed, always the same."""

import peft
import pytest
import torch

from ropewalk.adapt import AdapterConfig, adapter_parameters, apply_adapter, save_adapter
from ropewalk.errors import UserError
from ropewalk.model import KVCache, from_config, load_model
from ropewalk.ops import linear_cross_entropy
from ropewalk.serve import Chat, generate
from ropewalk.train.activations import save_activations

BOTH = pytest.mark.parametrize("method", ["prompt", "prefix"])
FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
"""Plain; window, softcap and scaled embeddings; learned positions."""


def adapted(tiny, method, tokens=5):
    model = tiny.ours()
    apply_adapter(model, AdapterConfig(method, tokens=tokens))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    return model


def tokens_of(count, length, seed=0):
    return torch.randint(3, 37, (count, length), generator=torch.Generator().manual_seed(seed))


def gradient(model):
    (parameter,) = adapter_parameters(model).values()
    found = parameter.grad
    parameter.grad = None
    return found


LONGROPE = (
    {"model_type": "phi3", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 16}
    | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"max_position_embeddings": 64, "original_max_position_embeddings": 12, "pad_token_id": 0}
    | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}}
    | {"bos_token_id": 1, "eos_token_id": 2}
)
"""Above 12 tokens, virtual ones included, all frequencies are others."""


@BOTH
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "mixtral", "longrope"])
@torch.no_grad()
def test_they_begin_as_real_tokens_at_the_beginning(tiny_model, family, method):
    """Untrained, they are the tokens that the seed draws, read before the document."""
    model = from_config(LONGROPE, seed=0) if family == "longrope" else tiny_model(family).ours()
    if (family, method) == ("longrope", "prefix"):
        pytest.skip("keys of a prefix do not change with the length of the document")
    drawn = torch.randint(37, (1, 5), generator=torch.Generator().manual_seed(4))
    tokens = tokens_of(2, 10)
    expected = model(torch.cat((drawn.expand(2, -1), tokens), 1))[:, 5:]
    apply_adapter(model, AdapterConfig(method, tokens=5), seed=4)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@BOTH
@FAMILIES
def test_packed_documents_equal_separate_ones(tiny_model, family, method):
    """Values and gradients; padding between and after the documents."""
    model = adapted(tiny_model(family), method).train()
    lengths, row = (3, 1, 6, 6), torch.zeros(1, 20, dtype=torch.int64)
    segments = torch.full((1, 20), -1)
    documents, at = [], 0
    for number, length in enumerate(lengths):
        documents.append(tokens_of(1, length, number))
        row[0, at : at + length], segments[0, at : at + length] = documents[-1], number
        at += length + (number == 1)
    separate = torch.cat([model(document)[0] for document in documents])
    separate.square().sum().backward()
    expected = gradient(model)
    packed = model(row, segments=segments)[segments >= 0]
    packed.square().sum().backward()
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_give_the_same_gradients(llama, method, mode):
    model = adapted(llama, method).train()
    gradients = []
    for chosen in ("none", mode):
        save_activations(model, chosen)
        model(llama.tokens()).square().sum().backward()
        gradients.append(gradient(model))
    assert gradients[0].any()
    assert torch.equal(*gradients)


@BOTH
@FAMILIES
@torch.no_grad()
def test_a_cache_holds_them_in_its_first_slots(tiny_model, family, method):
    """In pieces, in ragged rows, from a shared beginning, after forgetting: as without a cache."""
    model = adapted(tiny_model(family), method).eval()
    tokens = tokens_of(2, 12)
    whole = model(tokens)
    cache = KVCache(model.config, 2, 12)
    pieces = [model(piece, cache=cache) for piece in tokens.split((4, 1, 5, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert (cache.length, cache.slots) == (12, 17)
    for kept in (6, 0):
        cache.truncate(kept)
        torch.testing.assert_close(
            model(tokens[:, kept:], cache=cache), whole[:, kept:], rtol=1e-4, atol=1e-5
        )

    padded, positions = tokens.clone(), torch.arange(12).repeat(2, 1)
    padded[1, 5:], positions[1] = tokens[1, :7], torch.arange(-5, 7).clamp(min=-1)
    cache = KVCache(model.config, 2, 13)
    for start, stop in ((0, 4), (4, 8), (8, 12)):
        out = model(padded[:, start:stop], positions=positions[:, start:stop], cache=cache)
    torch.testing.assert_close(out[0], whole[0, 8:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1], whole[1, 3:7], rtol=1e-4, atol=1e-5)
    cache.select([1])
    out = model(tokens[1:, 7:8], cache=cache)
    torch.testing.assert_close(out, whole[1:, 7:8], rtol=1e-4, atol=1e-5)

    cache = KVCache(model.config, 1, 3)
    model(tokens[:1, :3], cache=cache)
    cache = cache.expand(2, 12)
    rest = torch.cat((tokens[:1, 3:], tokens[:1, 3:]))
    torch.testing.assert_close(model(rest, cache=cache)[1], whole[0, 3:], rtol=1e-4, atol=1e-5)


@BOTH
@torch.no_grad()
def test_longrope_reads_them_again_where_all_frequencies_change(method):
    model = from_config(LONGROPE, seed=0).eval()
    apply_adapter(model, AdapterConfig(method, tokens=5))
    tokens, cache = tokens_of(2, 10), KVCache(model.config, 2, 10)
    pieces = [model(piece, cache=cache) for piece in tokens.split((4, 2, 3, 1), 1)]
    torch.testing.assert_close(pieces[0], model(tokens[:, :4]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces[2], model(tokens[:, :9])[:, 6:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pieces[3], model(tokens)[:, 9:], rtol=1e-4, atol=1e-5)


@BOTH
def test_generation_equals_pefts(tiny_llama_dir, tiny_tokenizer, tmp_path, method):
    """Greedy answers to prompts of unequal length with a common beginning, in one batch; and in a chat."""
    from transformers import AutoModelForCausalLM

    model = load_model(tiny_llama_dir)
    apply_adapter(model, AdapterConfig(method, tokens=4), seed=3)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.mul_(8)
    plain = generate(load_model(tiny_llama_dir), tiny_tokenizer, [[5, 6, 7]], max_new_tokens=8)[0].tokens
    save_adapter(model, tmp_path / "a", str(tiny_llama_dir))
    loaded = load_model(tmp_path / "a")
    shared = list(range(40, 110))
    prompts = [[*shared, 5, 6, 7], [*shared, 9], [*shared, 30, 31, 32, 33, 34]]
    answers = generate(loaded, tiny_tokenizer, prompts, max_new_tokens=8)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        found = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert answer.tokens == found[0, -len(answer.tokens) :].tolist()
    assert generate(loaded, tiny_tokenizer, [[5, 6, 7]], max_new_tokens=8)[0].tokens != plain

    chat = Chat(loaded, tiny_tokenizer, max_new_tokens=6)
    first = "".join(chat.say("a rope"))
    second = "".join(chat.say("and a sail"))
    turns = [{"role": "user", "content": "a rope"}, {"role": "assistant", "content": first}]
    turns.append({"role": "user", "content": "and a sail"})
    if first.strip():
        assert second == generate(loaded, tiny_tokenizer, [turns], max_new_tokens=6)[0].text


@BOTH
def test_they_learn(llama, method):
    """The loss falls; nothing but the virtual tokens changes."""
    model = adapted(llama, method).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = tokens_of(2, 12)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(30):
        hidden = model(tokens)[:, :-1].flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.output_weight, tokens[:, 1:].flatten()) / 22
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapter_parameters(model))


def test_prompt_tokens_run_once_however_many_rows(llama):
    model = adapted(llama, "prompt")
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(tuple(inputs[0].shape[:2])))
    model(tokens_of(3, 8), segments=torch.tensor([[0] * 4 + [1] * 4] * 3))
    assert sorted(seen) == [(1, 5), (3, 8)]


def test_learned_positions_count_them(tiny_model):
    model = adapted(tiny_model("gpt2"), "prompt")  # 32 positions
    assert model.context_length == 27
    model(tokens_of(1, 27))
    with pytest.raises(UserError, match="only 32 positions"):
        model(tokens_of(1, 28))


@pytest.mark.slow
@BOTH
def test_compiled_blocks_read_them(llama, method):
    model = adapted(llama, method).train()
    segments = torch.tensor([[0] * 5 + [1] * 6] * 2)
    gradients = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend="aot_eager")
        model(llama.tokens(), segments=segments).square().sum().backward()
        gradients.append(gradient(model))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

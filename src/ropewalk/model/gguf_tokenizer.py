"""Makes a Hugging Face tokenizer from the vocabulary in a GGUF file's metadata.

The token ids are llama.cpp's (its `src/llama-vocab.cpp` is the specification: the format itself only says
which of its tokenizers to run). Two of them: byte-level BPE with a named pre-tokenizer (`gpt2`), and
SentencePiece-style merging by score (`llama`). Where a model's first tokenizer did more than llama.cpp does,
as Qwen's Unicode normalization, llama.cpp is followed. A tokenizer that is not known here is refused by name:
a wrong pre-tokenizer still gives text that looks right.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.model.gguf import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS_3 = r"\p{N}", r"\p{N}{1,3}"
_CJK = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"


def _tiktoken(digits: str) -> str:
    """The pattern that came with GPT-4, by how it groups digits."""
    return (
        rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, suffix: str) -> str:
    """The pattern that came with GPT-4o: words also end where lower case turns into upper."""
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2,),
    "digits": (_DIGIT, _GPT2),
    "llama3": (_tiktoken(_DIGITS_3),),
    "qwen2": (_tiktoken(_DIGIT),),
    "tekken": (_cased(_DIGIT, ""),),
    "gpt4o": (_cased(_DIGITS_3, f"(?:{_CONTRACTION})?"),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek3": (
        _DIGITS_3,
        _CJK,
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""What cuts text into words, one pattern after the other: at the matches and between them."""

PRE_TOKENIZERS = {
    name: patterns
    for patterns, names in {
        "gpt2": "gpt-2 phi-2 olmo mpt gigachat a.x-4.0 mellum exaone4 trillion",
        "digits": "smollm starcoder refact command-r codeshell exaone minerva-7b",
        "llama3": "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4",
        "qwen2": "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 kormo",
        "tekken": "tekken",
        "gpt4o": "gpt-4o llama4 kanana2",
        "falcon": "falcon",
        "deepseek3": "deepseek-v3 hunyuan-dense",
        "default": "default",
    }.items()
    for name in names.split()
}
"""tokenizer.ggml.pre -> pattern."""

_WHOLE_WORDS = frozenset("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split())
"""Pre-tokenizers with which a word that is a token needs no merges, and BOS is added by default."""

_ALWAYS_CONTROL = frozenset(
    """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>
    <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <｜end▁of▁sentence｜>
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>
    <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]
    <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
    """.split()
)
"""Tokens that are control tokens whatever the file says (converters have often called them normal)."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values in tokenizer.ggml.token_type."""

MAX_TOKEN = 1000
"""Characters; real tokens have at most a few dozen, and work grows with their square."""


def build_tokenizer(file: GgufFile) -> "PreTrainedTokenizerFast":
    """The tokenizer described in a file's metadata, with its special tokens and chat template.

    Raises UserError for a tokenizer that is not known here, or metadata that contradicts itself.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    fields = _Fields(file)
    kind = fields.get("model", str)
    if kind == "gpt2":
        pre = fields.get("pre", str, "default")
        tokenizer = _byte_level_bpe(fields, pre)
        add_bos_default = pre in _WHOLE_WORDS
    elif kind == "llama":
        tokenizer = _sentencepiece(fields)
        add_bos_default = True
    else:
        raise fields.fail(f"its kind is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' are supported")

    texts = fields.tokens
    strips = _strips_right(file)
    tokenizer.add_tokens(
        [
            AddedToken(texts[i], special=type != _USER_DEFINED, normalized=False, rstrip=texts[i] in strips)
            for i, type in fields.special_tokens()
        ]
    )
    defaults = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    ids = {name: fields.token_id(name, defaults.get(name)) for name in ("bos", "eos", "unk", "pad")}
    wanted = [
        [ids["bos"]] if fields.get("add_bos_token", bool, add_bos_default) else [],
        [ids["eos"]] if fields.get("add_eos_token", bool, False) else [],
    ]
    first, last = ([i for i in end if i is not None] for end in wanted)
    if [first, last] != wanted:
        raise fields.fail("it adds a token at the beginning or end of every text, but does not say which")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(f"{texts[i]}:0" for i in first), "$A:0", *(f"{texts[i]}:0" for i in last)],
        special_tokens=[(texts[i], i) for i in sorted({*first, *last})],
    )
    template = file.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=fields.context_length(),
        chat_template=template if isinstance(template, str) else None,
        **{f"{name}_token": texts[i] for name, i in ids.items() if i is not None},
    )


def _byte_level_bpe(fields: "_Fields", pre: str) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in PRE_TOKENIZERS:
        raise fields.fail(
            f"the pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported; these are: "
            + ", ".join(sorted(PRE_TOKENIZERS))
        )
    vocabulary = fields.vocabulary
    merges = []
    for line in fields.strings("merges"):
        left, _, right = line[1:].partition(" ")  # a merge may begin with the space that is a token
        pair = (line[:1] + left, right)
        if any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise fields.fail(f"the merge {line!r} speaks of tokens that are not in the vocabulary")
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS))
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[PRE_TOKENIZERS[pre]]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    if missing:  # bytes without a token are left out, but what stood around them is not merged
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, missing))), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: "_Fields") -> "Tokenizer":
    """Merging by score: any two neighbours that form a token, best score first. Said as BPE merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = fields.vocabulary
    scores = fields.numbers("scores", "fi")
    ranked: list[tuple[float, int, str, str]] = []
    for token, id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-float(scores[id]), id, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    unknown = fields.token_id("unk", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, _, left, right in ranked],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else fields.tokens[unknown],
        )
    )
    prefix = fields.get("add_space_prefix", bool, True)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _strips_right(file: GgufFile) -> frozenset[str]:
    """phi-3's control tokens swallow the white space after them; the file says so only by its name."""
    name = str(file.metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(file.metadata["tokenizer.ggml.tokens"]) - {"<unk>", "<s>", "<|endoftext|>"}


class _Fields:
    """Checked access to the `tokenizer.ggml.*` metadata."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        words = self.strings("tokens")
        self.tokens = [word or f"[EMPTY_{i}]" for i, word in enumerate(words)]
        self.vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if not words:
            raise self.fail("its vocabulary is empty")
        if len(self.vocabulary) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.vocabulary[t] != i)
            raise self.fail(f"the token {twice!r} occurs twice in its vocabulary")
        if (longest := max(map(len, self.tokens))) > MAX_TOKEN:
            raise self.fail(f"it has a token of {longest:,} characters")

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self.file.path}: the tokenizer cannot be used: {problem}")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise self.fail(f"tokenizer.ggml.{name} is missing")
        if not isinstance(value, kind):
            raise self.fail(f"tokenizer.ggml.{name} is not of type {kind.__name__}")
        return value

    def strings(self, name: str) -> list[str]:
        return self.get(name, list)

    def numbers(self, name: str, kinds: str) -> np.ndarray:
        """An array with a number for each token."""
        value = self.get(name, np.ndarray)
        if value.dtype.kind not in kinds or len(value) < len(self.tokens):
            raise self.fail(f"tokenizer.ggml.{name} does not have {len(self.tokens):,} numbers, one a token")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """The id of a special token; like in llama.cpp, one outside the vocabulary counts as not given."""
        key = {"unk": "unknown", "pad": "padding"}.get(name, name)
        value = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
        for id in (value, default):
            if isinstance(id, int) and 0 <= id < len(self.tokens):
                return id
        return None

    def special_tokens(self) -> list[tuple[int, int]]:
        """Ids that are found in text before anything else is done with it, and their token types."""
        types = [1] * len(self.tokens)
        if "tokenizer.ggml.token_type" in self.file.metadata:
            types = self.numbers("token_type", "iu").tolist()
        for text in _ALWAYS_CONTROL & self.vocabulary.keys():
            types[self.vocabulary[text]] = _CONTROL
        special = (_UNKNOWN, _CONTROL, _USER_DEFINED)
        return [(i, types[i]) for i in range(len(self.tokens)) if types[i] in special]

    def context_length(self) -> int:
        architecture = self.file.metadata.get("general.architecture")
        value = self.file.metadata.get(f"{architecture}.context_length")
        return value if isinstance(value, int) else 1 << 30

"""A tokenizer learned from texts: byte-level BPE, so that every text has tokens and comes back exactly.

BPE: Sennrich et al. 2016 (arXiv 1508.07909); over bytes: Radford et al. 2019 (GPT-2). A text is first split
as Llama 3 and GPT-4 do, and merges stay inside of what is between the splits. Learning counts pieces, and
of pairs that are equally frequent takes the one made first: the order of the texts makes no difference.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.data.parts import Progress
from ropewalk.data.readers import Source
from ropewalk.data.texts import batches_of
from ropewalk.errors import UserError
from ropewalk.files import atomic_directory

END, PADDING = "<|endoftext|>", "<|padding|>"
SPECIAL = (END, PADDING, "<|im_start|>", "<|im_end|>")
"""Tokens that no text is split into: the end of a document, padding, and two for a chat template."""
BYTES = 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is split: contractions, letters with what is right before them, at most so many digits, other
signs, white space. With 3 digits it is Llama 3's and GPT-4's expression, with 1 it is Qwen 2's."""
MOST = 1 << 22
"""Tokens for which `tokenizers` takes its memory beforehand; where that is not there, it ends the process."""
LEAST = 2
"""A pair of tokens that is met once is no pattern."""


@dataclass
class Learned:
    """What was read of a source."""

    name: str
    texts: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was learned, from what. `bytes` are of UTF-8; `asked`: the vocabulary that was."""

    directory: Path
    vocab_size: int
    asked: int
    digits: int
    special: tuple[str, ...]
    sources: tuple[Learned, ...]

    @property
    def note(self) -> str | None:
        """What there is to say of a vocabulary that is smaller than it should be."""
        if self.vocab_size == self.asked:
            return None
        return f"{self.asked:,} tokens were asked for; the texts have no more pairs that are met twice"


def train_tokenizer(
    sources: Sequence[Source],
    vocab_size: int,
    directory: str | Path,
    *,
    digits: int = 3,
    special: Sequence[str] = (),
    chat_template: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedTokenizer:
    """Learns a byte-level BPE tokenizer and writes it as a Hugging Face directory.

    vocab_size: tokens in all, the special ones (SPECIAL and then `special`) and 256 bytes among them.
    digits: a number is split into so many digits at most, 1 to 3. chat_template: path of a Jinja template.
    Texts are read one batch after the other; memory grows with their different words alone.
    Raises UserError for a vocabulary without room for a merge, for what cannot be read, and where
    `directory` exists (unless `overwrite`).
    """
    directory = Path(directory)
    names = tuple(dict.fromkeys((*SPECIAL, *special)))
    if not all(names):
        raise UserError("--special: a token needs a name")
    if vocab_size <= BYTES + len(names):
        raise UserError(
            f"vocab size: {vocab_size:,} has no room to learn anything; {BYTES} bytes and {len(names)} "
            "special tokens are in every vocabulary"
        )
    if vocab_size > MOST:
        raise UserError(f"vocab size: {vocab_size:,} is more than {MOST:,}, for which no model has room")
    if digits not in (1, 2, 3):
        raise UserError(f"digits: {digits}; must be 1, 2 or 3")
    template = None if chat_template is None else _template(chat_template)
    if directory.exists() and not overwrite:
        raise UserError(f"{directory}: already exists; nothing was overwritten (--overwrite replaces it)")
    counts = [Learned(source.name) for source in sources]
    backend = _learn(_texts(sources, counts, progress), vocab_size, digits, names)
    found = TrainedTokenizer(directory, backend.get_vocab_size(), vocab_size, digits, names, tuple(counts))
    with atomic_directory(directory, overwrite=overwrite) as folder:
        _write(backend, folder, template)
        account = {**asdict(found), "directory": None}
        (folder / "learned_from.json").write_text(json.dumps(account, indent=1, ensure_ascii=False) + "\n")
    return found


def _texts(
    sources: Sequence[Source], counts: Sequence[Learned], progress: Progress | None
) -> Iterator[list[str]]:
    for source, count in zip(sources, counts, strict=True):
        for batch in batches_of(source, progress):
            texts = [text for record in batch for text in record.contents]
            count.texts += len(batch)
            count.bytes += sum(len(text.encode()) for text in texts)
            yield texts


def _learn(texts: Iterator[list[str]], vocab_size: int, digits: int, special: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN % digits), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write(backend: Any, folder: Path, template: str | None) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,  # GPT-2's way: what ends a document also stands before one
        eos_token=END,
        pad_token=PADDING,
        chat_template=template,
        clean_up_tokenization_spaces=False,  # it would take away spaces before commas
    ).save_pretrained(folder)


def _template(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path}: {error}") from None

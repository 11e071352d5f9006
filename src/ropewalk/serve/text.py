"""From tokens to text as they come: whole characters only, and nothing that a stop string would take back."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; the pieces joined are the whole answer's text.

    A character whose bytes are spread over several tokens is given when it is whole. `context` is the
    end of the prompt: decoding in its company keeps the first space that SentencePiece tokenizers drop
    at the start of a text. Special tokens give no text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        # Only a short window is decoded each time: from the second last point at which all was whole.
        self._window = list(context[-8:])
        self._whole = len(self._window)
        self._given = self._text().rstrip(UNFINISHED)

    def push(self, token: int) -> str:
        """The text that `token` makes certain; empty while a character is unfinished."""
        self._window.append(token)
        text = self._text()
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self._given) :]
        if piece:
            del self._window[: self._whole]
            self._whole = len(self._window)
            self._given = self._text()
        return piece

    def flush(self) -> str:
        """What is left at the end, bytes that never became a character included."""
        text = self._text()
        piece, self._given = text[len(self._given) :], text
        return piece

    def _text(self) -> str:
        return self._decode(self._window, skip_special_tokens=True)


class StopStrings:
    """Cuts a text that comes in pieces before the stop string that is completed first.

    Where two are completed by the same character, the cut is before the longer. How the text was cut
    into pieces makes no difference. `push` gives what can be shown: text that may turn out to be the
    beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(s for s in stop if s)
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The part of the text so far that is safe to show and was not shown yet."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

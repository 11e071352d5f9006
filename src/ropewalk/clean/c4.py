"""What the rules of C4 look at (Raffel et al. 2020, 2.2; the details as in its published code)."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ropewalk.clean.lines import Lines, any_of
from ropewalk.clean.quality import ends_with_ellipsis, sentence_ends
from ropewalk.clean.step import Step, Texts, spans_of
from ropewalk.clean.words import Words

POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
ENDS = ".?!\"'”’"
FEWEST_WORDS, LONGEST_WORD = 3, 1000
KINDS = ("long_word", "no_end_mark", "few_words", "javascript", "policy")


class C4(Step):
    """The lines that C4 would leave out, and what decides over the page."""

    name = "c4"
    attributes: Mapping[str, str] = {
        "c4_lines": "places of the lines that C4 leaves out, line feed included: no mark at the end, fewer "
        f"than {FEWEST_WORDS} words, a word of more than {LONGEST_WORD} characters, JavaScript, or policies",
        "c4_sentences": "sentences in the other lines",
        "curly_brackets": "signs { and }",
        "lorem_ipsum": "whether it has the words lorem ipsum",
    }

    def map(self, texts: Texts) -> pa.Table:
        words, lines = texts.words, texts.lines.filled
        kind = _kinds(words, lines)
        cut, kept = lines.where(kind >= 0), lines.where(kind < 0)
        begins = words.begins[cut.document]
        # The line feed, or the end of the text.
        ends = np.minimum(cut.ends + 1, words.begins[cut.document + 1])
        ended = np.zeros(len(words) + 1, np.int64)
        ended[sentence_ends(words) + 1] = 1
        ended = np.cumsum(ended)
        sentences = np.maximum(ended[kept.after] - ended[kept.first], 1)
        brackets = (t.count("{") + t.count("}") for t in texts.texts)
        columns = {
            "c4_lines": spans_of(
                len(texts), cut.document, cut.starts - begins, ends - begins, kind[kind >= 0], KINDS
            ),
            "c4_sentences": np.bincount(kept.document, sentences, minlength=len(texts)).astype(np.int64),
            "curly_brackets": np.fromiter(brackets, np.int64, len(texts)),
            "lorem_ipsum": words.texts_with(words.find("lorem ipsum")),
        }
        return pa.table(columns)


def _kinds(words: Words, lines: Lines) -> np.ndarray:
    """[lines] why each is left out, a number of KINDS, or -1."""

    def has(found: np.ndarray) -> np.ndarray:
        """Whether any of the words with these numbers is in the line."""
        places = np.sort(found)
        return np.searchsorted(places, lines.after) > np.searchsorted(places, lines.first)

    plain = np.concatenate([[0], np.cumsum(~words.symbol)])
    policies = np.concatenate([words.find(phrase) for phrase in POLICY])
    reasons = (
        has(np.flatnonzero(words.ends - words.starts > LONGEST_WORD)),
        ~any_of(lines.last_character(), ENDS) | ends_with_ellipsis(lines),
        plain[lines.after] - plain[lines.first] < FEWEST_WORDS,
        has(words.find("javascript")),
        has(policies),
    )
    return np.select(reasons, range(len(KINDS)), -1)

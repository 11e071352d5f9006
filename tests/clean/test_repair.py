"""Repairing undoes wrong decoding and leaves right text alone."""

import unicodedata

import pytest

pytest.importorskip("ftfy")
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ropewalk.clean.repair import Repair, repair
from ropewalk.clean.step import Texts

from .samples import ODD, pages

RIGHT = [
    "Über die „schöne“ Größe – naïve café… 5 €",
    "Привет, мир! Как дела?",
    "日本語のテキスト。\n\tzweite Zeile",
    "ﬁn &amp; “curly” ½ Ａ",
    "plain ASCII\n\ntext",
]


def wrongly_decoded(text: str, encoding: str) -> str:
    return text.encode("utf-8").decode(encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "cp437"])
@pytest.mark.parametrize("text", RIGHT[:2])
def test_wrong_decoding_is_undone(text, encoding):
    wrong = wrongly_decoded(text, encoding)
    assert wrong != text
    assert repair(wrong) == text
    assert Repair().map(Texts([wrong, text]))["mojibake"].to_pylist() == [True, False]


@pytest.mark.parametrize("text", RIGHT)
def test_right_text_is_left_alone(text):
    assert repair(text) == text


def test_real_text_is_left_alone_but_for_its_line_ends(shared):
    texts = [text.replace("\ufeff", "") for text in pages(shared, 300)]
    changed = [text for text in texts if repair(text) != text]
    assert len(changed) <= 3, changed


def test_controls_go_line_ends_become_one_and_accents_are_composed():
    assert repair("a\x00b\r\nc\rd\u2028e\ufeff\x1b[0m\ttab\x7f") == "ab\nc\nd\ne[0m\ttab"
    assert repair("Cafe\u0301 \ud800x") == "Café x"
    rows = Repair().map(Texts(["a\x00\x01", "a\r\nb", "e\u0301", "fine"])).to_pylist()
    assert [row["controls"] for row in rows] == [2, 0, 0, 0]
    assert [row["line_ends"] for row in rows] == [False, True, False, False]
    assert [row["composed"] for row in rows] == [True, True, False, True]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("aÃ¶â€œ\x9d\x85\x00é\u0301\r\n\ufeffÐ¿Â\xa0�\ud800 "), max_size=30))
@example("Ã\x00¶")
def test_a_repaired_text_is_whole_and_repairing_it_again_changes_nothing(text):
    once = repair(text)
    assert repair(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode("utf-8")
    assert not set(once) & set("\x00\r\x85\ufeff")


def test_neighbours_do_not_matter():
    whole = Repair().map(Texts([*ODD, *RIGHT]))
    assert set(whole.column_names) == set(Repair.attributes)
    assert whole.to_pylist() == [Repair().map(Texts([text])).to_pylist()[0] for text in [*ODD, *RIGHT]]

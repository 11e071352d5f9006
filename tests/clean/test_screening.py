"""Listed words are counted whatever their case, as words only, and no published rule drops by them."""

import pytest

from ropewalk.clean.rules import PRESETS, columns_of
from ropewalk.clean.screening import IDENTITY, LISTS, Screening
from ropewalk.clean.step import Texts
from ropewalk.clean.words import hashes_of


def test_counts_are_for_a_thousand_words_and_of_whole_words():
    text = "Damn! That CRAP of a man, " + "word " * 14
    rows = (
        Screening()
        .map(Texts(["", text, "Scrapped in Scunthorpe, undamned; a woman and a classic."]))
        .to_pylist()
    )
    assert rows[1]["profanity"] == pytest.approx(100)
    assert rows[1]["identity"] == pytest.approx(50)
    assert {name: rows[2][name] for name in ("profanity", "sexual", "slurs", "violence")} == {
        "profanity": 0, "sexual": 0, "slurs": 0, "violence": 0
    }  # fmt: skip
    assert set(rows[0].values()) == {0}


def test_a_word_is_in_one_list_once():
    listed = [value for text in LISTS.values() for value in hashes_of(text).tolist()]
    assert len(listed) == len(set(listed)) > 150
    assert len(IDENTITY.split()) == len(hashes_of(LISTS["identity"]))


def test_no_published_rule_drops_by_them():
    used = {name for rules in PRESETS.values() for rule in rules for name in columns_of(rule.expression)}
    assert not used & set(Screening.attributes)

"""Languages are those that py3langid itself says of each text alone, in a batch of any kind."""

import pytest

pytest.importorskip("py3langid")
from ropewalk.clean.language import CHARACTERS, Language
from ropewalk.clean.step import Texts

from .samples import ODD, pages

SENTENCES = {
    "de": "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller.",
    "en": "All human beings are born free and equal in dignity and rights, and should act as such.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits, dit la déclaration.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах, и наделены разумом.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا",
}


def classify(texts):
    return Language().map(Texts(texts)).to_pylist()


def test_languages_are_told_apart_with_confidence():
    for (code, _), row in zip(SENTENCES.items(), classify(list(SENTENCES.values())), strict=True):
        assert row["language"] == code
        assert row["language_score"] > 0.5


def test_the_result_is_that_of_the_library(shared):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    library = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    texts = [*SENTENCES.values(), "ALL CAPITALS HERE", "e\u0301cole ne\u0301e", *pages(shared, 60)]
    for text, row in zip(texts, classify(texts), strict=True):
        label, score = library.classify(text[:CHARACTERS])
        assert row == {"language": label, "language_score": pytest.approx(score, abs=2e-4)}


def test_nothing_to_tell_from_is_undetermined_and_neighbours_do_not_matter():
    texts = [*ODD, *SENTENCES.values()]
    together = classify(texts)
    assert together[0] == {"language": "und", "language_score": 0.0}
    assert together == [classify([text])[0] for text in texts]
    assert classify([]) == []

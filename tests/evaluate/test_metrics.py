"""Scores by hand and against sacrebleu; ROUGE-L's figures are those of Google's rouge_score 0.1.2."""

import sys

import pytest

from ropewalk.errors import UserError
from ropewalk.evaluate.metrics import chrf, exact_match, rouge_l, score_corpus, score_row


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (" a  b\n", "a b", 100.0),
        ("cafe\u0301", "caf\u00e9", 100.0),
        ("A b", "a b", 0.0),
        ("a b.", "a b", 0.0),
        ("", "", 100.0),
    ],
)
def test_exact_match_forgives_white_space_and_unicode_form_only(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 75.0),
        ("the gunman kill police", "police killed the gunman", 50.0),
        ("Return the sum, rounded to_2 places.", "Returns the rounded sum of the list", 200 / 7),
        ("the cat", "The CAT!", 100.0),
        ("", "something", 0.0),
        ("...", "...", 0.0),
        ("Über naïve Straßen", "über naïve straßen", 100.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_chrf_is_that_of_sacrebleu_per_row_and_for_the_corpus():
    from sacrebleu.metrics import CHRF

    answers, references = (
        ["the cat sat", "dogs bark", "x"],
        ["the cat sat down", "the dog barks", "completely"],
    )
    assert chrf(answers[0], references[0]) == pytest.approx(
        CHRF().sentence_score(answers[0], references[:1]).score
    )
    corpus = score_corpus(["chrf"], answers, references)["chrf"]
    assert corpus == pytest.approx(CHRF().corpus_score(answers, [references]).score)
    assert corpus != pytest.approx(sum(map(chrf, answers, references)) / 3)


def test_the_corpus_score_of_the_others_is_the_mean():
    answers, references = ["a", "b c"], ["a", "b"]
    scores = score_corpus(["exact_match", "rouge_l"], answers, references)
    assert scores == {"exact_match": 50.0, "rouge_l": pytest.approx((100 + 200 / 3) / 2)}
    assert score_row(["exact_match"], "a", "a") == {"exact_match": 100.0}


def test_without_sacrebleu_chrf_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"ropewalk\[eval\]"):
        chrf("a", "b")


def test_a_metric_that_there_is_not_is_said_before_the_work():
    with pytest.raises(UserError, match="metric bleu: one of exact_match"):
        score_row(["exact_match", "bleu"], "", "")

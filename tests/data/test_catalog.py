"""The steps there are: what the documentation says of them, and that their attributes can be told apart."""

from pathlib import Path

from ropewalk.clean.classifier import QualityClassifier
from ropewalk.clean.contamination import Contamination, Paraphrases
from ropewalk.clean.duplicates.vectors import SimilarVectors
from ropewalk.clean.perplexity import Perplexity
from ropewalk.data.catalog import plan_of, steps_of
from ropewalk.recipe.schema import Clean

STEPS = [
    *steps_of(Clean().model_dump(), ()),
    QualityClassifier,
    Contamination,
    Paraphrases,
    SimilarVectors,
    Perplexity("any"),
]


def test_every_attribute_is_documented_in_its_own_words():
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [
        line
        for step in STEPS
        for name, what in step.attributes.items()
        if (line := f"| `{name}` | {what} |") not in text
    ]
    assert missing == []


def test_no_two_steps_have_a_name_or_an_attribute_in_common():
    names = [step.name for step in STEPS]
    attributes = [name for step in STEPS for name in step.attributes]
    assert len(set(names)) == len(names)
    assert len(set(attributes)) == len(attributes)


def test_only_the_steps_that_something_asks_for_are_run():
    def steps(**clean):
        return [step.name for step in plan_of(Clean(**clean).model_dump()).needed()]

    assert steps() == []
    assert steps(keep={"a": "words > 5"}) == ["quality"]
    assert steps(pii="mask") == ["pii"]
    assert steps(rules=["c4"]) == ["c4"]
    assert steps(duplicates=["near"], keep={"a": "language = 'en'"}) == ["language", "near_duplicates"]
    assert steps(score="1 - duplicate_lines", duplicates=["lines"]) == ["repetition", "repeated_lines"]

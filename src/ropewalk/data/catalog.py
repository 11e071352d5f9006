"""The cleaning steps there are, and what the words of the recipe's data.clean ask of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.clean.c4 import C4
from ropewalk.clean.classifier import Classifier, QualityClassifier
from ropewalk.clean.code import Code
from ropewalk.clean.contamination import Contamination, Paraphrases
from ropewalk.clean.duplicates.exact import ExactDuplicates
from ropewalk.clean.duplicates.minhash import NearDuplicates
from ropewalk.clean.duplicates.pieces import DuplicateLines, DuplicateParagraphs
from ropewalk.clean.duplicates.substrings import DuplicateSubstrings
from ropewalk.clean.duplicates.vectors import SimilarVectors
from ropewalk.clean.language import Language
from ropewalk.clean.perplexity import Perplexity
from ropewalk.clean.pii import Pii
from ropewalk.clean.quality import Quality
from ropewalk.clean.repair import Repair
from ropewalk.clean.repetition import Repetition
from ropewalk.clean.rules import Rule
from ropewalk.clean.screening import Screening
from ropewalk.clean.step import Step
from ropewalk.clean.vectors import CharacterNgrams, ModelVectors
from ropewalk.data.cleaning import Plan, rules_of
from ropewalk.data.edits import Action
from ropewalk.data.evaluation_sets import EvaluationSet, read_evaluation_set

DUPLICATES = {
    "exact": Rule("exact_duplicate", "exact_duplicate_of = -1", "the text of another document", "data.clean"),
    "near": Rule("near_duplicate", "near_duplicate_of = -1", "nearly another document's text", "data.clean"),
}
REPEATS = ("paragraphs", "lines", "passages")
"""Words of data.clean.duplicates; the places that are cut out are the attributes repeated_WORD."""
_CONTAMINATED = Rule(
    "contaminated", "not contaminated", "holds items of an evaluation set", "data.clean.against"
)
_PII = Rule("pii", "len(pii) = 0", "holds personal data", "data.clean.pii")


def plan_of(clean: Mapping[str, Any]) -> Plan:
    """From the fields of recipe.schema.Clean. Raises UserError for files that cannot be read, rules that
    there are not, and expressions that are none."""
    rules = [DUPLICATES[word] for word in clean["duplicates"] if word in DUPLICATES]
    edits: dict[str, Action] = {f"repeated_{word}": "cut" for word in clean["duplicates"] if word in REPEATS}
    if "c4" in clean["rules"]:  # which leaves lines out before it looks at what is left
        edits["c4_lines"] = "cut"
    asked: list[str] = []
    if clean["against"]:
        asked += ["contaminated", "contamination_items"]
        if clean["contaminated"] == "drop":
            rules.append(_CONTAMINATED)
        elif clean["contaminated"] == "mask":
            edits["contamination_spans"] = "mask"
    if clean["pii"] == "mask":
        edits["pii"] = "replace"
    elif clean["pii"] == "drop":
        rules.append(_PII)
    sets = tuple(read_evaluation_set(path) for path in clean["against"])
    return Plan(
        repair=clean["repair"],
        steps=steps_of(clean, sets),
        rules=rules_of(clean["rules"], clean["keep"], rules),
        edits=edits,
        asked=tuple(asked),
        prefer=clean["prefer"],
        score=clean["score"],
        sets=sets,
    )


def steps_of(clean: Mapping[str, Any], sets: Sequence[EvaluationSet]) -> tuple[Step, ...]:
    """All there are, in the order in which they may run."""
    steps: list[Step] = [Quality(), Repetition(), C4(), Language(), Pii(), Screening(), Code(), Repair()]
    if clean["quality"]:
        steps.append(QualityClassifier(Classifier.load(clean["quality"])))
    if clean["model"]:
        steps.append(Perplexity(clean["model"]))
    if sets:
        items = [item for one in sets for item in one.items]
        steps.append(Contamination(items))
        if "paraphrase" in " ".join(
            filter(None, clean["keep"].values())
        ):  # not made in vain: it takes seconds
            grams = CharacterNgrams([item.question for item in items])
            steps.append(Paraphrases(items, grams, "character n-grams"))
    steps += [ExactDuplicates(), NearDuplicates(threshold=clean["similarity"])]
    if clean["model"]:
        vectors = ModelVectors(clean["model"])
        steps.append(SimilarVectors(vectors, vectors.settings()))
    return (*steps, DuplicateParagraphs(), DuplicateLines(), DuplicateSubstrings())

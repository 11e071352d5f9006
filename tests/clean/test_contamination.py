"""Items of evaluation sets are found in real text, short ones too, and nothing else is."""

import importlib.util
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.clean.contamination import Account, Contamination, EvaluationItem
from ropewalk.clean.contamination.index import BOILERPLATE, Index
from ropewalk.clean.step import SPANS, Step, Texts
from ropewalk.clean.words import words_of

MATERIAL = Path(__file__).resolve().parents[2] / "bench" / "contamination_text.py"
spec = importlib.util.spec_from_file_location("contamination_text", MATERIAL)
material = importlib.util.module_from_spec(spec)
spec.loader.exec_module(material)
WRITINGS, gsm8k, insert = material.WRITINGS, material.gsm8k, material.insert

DUCKS = EvaluationItem(
    "maths",
    "0",
    "Janet’s ducks lay 16 eggs per day, and she eats three for breakfast. How many doesn't she eat?",
    "She doesn't eat 16 - 3 = <<16-3=13>>13 eggs a day.\n#### 13",
)
NEUTRON = EvaluationItem(
    "physics", "n", "What is a neutron?", "a baryon", ("a baryon", "a lepton", "a meson")
)
FILLER = "The ropewalk is a long straight building in which loose fibre becomes rope. "


def found(items, *texts):
    table = Contamination(items).map(Texts(texts))
    return [[(one["set"], one["item"]) for one in row] for row in table["contamination_items"].to_pylist()]


@pytest.fixture(scope="module")
def documents(shared):
    return material.unrelated(shared)


@pytest.fixture(scope="module")
def real(shared, documents):
    """(items, step): 14,000 short questions and GSM8K's test set."""
    items = material.short_questions(documents, 14_000, random.Random(1)) + gsm8k(shared)
    return items, Contamination(items)


# --- how much is found, on real text ----------------------------------------------------------


@pytest.mark.parametrize("writing", WRITINGS)
def test_of_every_length_nearly_all_are_found_wherever_they_stand_and_however_they_are_written(
    real, documents, writing
):
    items, step = real
    rng = random.Random(2)
    chosen = rng.sample(items[:14_000], 700) + rng.sample(items[14_000:], 150)
    texts = [insert(rng.choice(documents), WRITINGS[writing](item.question), rng) for item in chosen]
    rows = step.map(Texts(texts))["contamination_items"].to_pylist()
    by_length = defaultdict(list)
    for item, row in zip(chosen, rows, strict=True):
        length = min(13, len(words_of([item.question]).only))
        by_length[length].append(any((one["set"], one["item"]) == (item.set, item.id) for one in row))
    recall = {length: np.mean(hits) for length, hits in sorted(by_length.items())}
    assert {4, 5, 6, 8, 9, 13} <= set(recall)
    assert min(recall.values()) >= 0.95, recall


def test_at_most_one_in_a_thousand_unrelated_documents_is_taken_for_contaminated(real, documents):
    _, step = real
    tables = [step.map(Texts(documents[i : i + 500])) for i in range(0, len(documents), 500)]
    wrong = sum(pa.concat_tables(tables)["contaminated"].to_pylist())
    assert len(documents) > 7000
    assert wrong <= len(documents) / 1000


def test_tasks_of_the_same_trade_are_not_taken_for_contamination(shared, documents):
    """Described shell commands against texts on programming: the phrases of 4 words are the trade's own."""
    lines = (shared / "data" / "tldr_commands.jsonl").read_text(encoding="utf-8").splitlines()
    rows = random.Random(3).sample([json.loads(line) for line in lines], 14_000)
    step = Contamination(
        [EvaluationItem("tldr", str(i), r["task"], r["command"]) for i, r in enumerate(rows)]
    )
    tables = [step.map(Texts(documents[i : i + 500])) for i in range(0, len(documents), 500)]
    assert sum(pa.concat_tables(tables)["contaminated"].to_pylist()) <= len(documents) / 1000


def test_near_but_other_questions_are_told_apart(shared):
    """GSM8K's training questions have the manner and the phrases of its test questions, and are not these."""
    texts = [f"{item.question}\n{item.answer}" for item in gsm8k(shared, "train")]
    table = Contamination(gsm8k(shared)).map(Texts(texts))
    assert sum(table["contaminated"].to_pylist()) <= len(texts) / 1000


# --- what is said of what is found ------------------------------------------------------------


def test_the_place_is_the_questions_own_and_spans_hold_the_answer_too():
    question = DUCKS.question.upper().replace("’", "'")
    text = f"{FILLER}{question}\n{DUCKS.answer}\n{FILLER}"
    table = Contamination([DUCKS]).map(Texts([FILLER, text]))
    assert table["contaminated"].to_pylist() == [False, True]
    assert table["contaminated_by"].to_pylist() == [[], ["maths"]]
    assert table["contamination"].to_pylist() == [0, 1]
    assert table.schema.field("contamination_spans").type == SPANS
    (one,) = table["contamination_items"].to_pylist()[1]
    assert text[one["start"] : one["end"]] == question.rstrip("?")
    assert (one["set"], one["item"], one["share"], one["answer_found"]) == ("maths", "0", 1.0, True)
    asked, answered = table["contamination_spans"].to_pylist()[1]
    assert text[answered["start"] : answered["end"]] == DUCKS.answer
    assert asked["kind"] == answered["kind"] == "maths"


@pytest.mark.parametrize(
    ("after", "answered"),
    [
        ("", False),
        (" It is a baryon.", True),
        ("\nA. a baryon\nB. a lepton\nC. a meson\n", False),
        ("\nA. a baryon\nB. a lepton\nC. a meson\nAnswer: A", True),
        ("\nA. a baryon\nB. a lepton\nC. a meson\nAnswer: B", False),
        ("\nA. a baryon\nB. a lepton\nC. a meson\nIt is a baryon.", True),
        (" " + FILLER * 20 + "a baryon", False),
    ],
)
def test_an_answer_given_is_told_from_an_answer_that_is_only_listed(after, answered):
    table = Contamination([NEUTRON]).map(Texts([f"{FILLER}What is a neutron?{after}"]))
    (one,) = table["contamination_items"].to_pylist()[0]
    assert one["answer_found"] is answered


def test_common_phrases_need_their_answer_or_their_choices():
    """The same stem in many items, and phrases of common words only, say nothing by themselves."""
    fruits = ["durian", "rambutan", "mangosteen", "loquat", "feijoa"]
    items = [
        EvaluationItem("exam", str(i), "Which of the following is true?", f"The {fruit} ripens in its shell")
        for i, fruit in enumerate(fruits)
    ]
    phrase = EvaluationItem("exam", "phrase", "it is one of the most")
    alone = "Which of the following is true? Nobody knows. It is one of the most. "
    assert found([*items, phrase], alone * 3) == [[]]
    assert found(items[:1], alone) == [[]]
    assert found(items, "Which of the following is true? The loquat ripens in its shell.") == [
        [("exam", "3")]
    ]


def test_boilerplate_before_long_questions_does_not_count():
    lead = "Read the passage below with care and choose the one option that in your opinion answers best: "
    tails = ["where do herons of the northern marshes sleep in winter when ice covers their nests",
             "why did the miller of Trumpington lock his mare away before the two students came",
             "which alloy did Faraday and Stodart send to Sheffield for razors in their second year",
             "how many staves does a cooper need for a hogshead of beer with six iron hoops",
             "when did the last packet boat leave Harwich with mail for Gothenburg that autumn"]  # fmt: skip
    items = [EvaluationItem("reading", str(i), lead + tail) for i, tail in enumerate(tails)]
    assert len(items) > BOILERPLATE
    assert found(items, lead, lead + tails[2], tails[4]) == [[], [("reading", "2")], [("reading", "4")]]
    largest = Contamination(items).map(Texts([lead])).column("contamination").to_pylist()
    assert largest == [0]


def test_half_of_a_long_question_counts_and_less_does_not():
    words = [f"w{i}x" for i in range(64)]
    item = EvaluationItem("s", "0", " ".join(words))
    step = Contamination([item])
    table = step.map(Texts([" ".join(words[:38]), " ".join(words[:37]), " ".join(words[:12])]))
    assert table["contaminated"].to_pylist() == [True, False, False]
    assert table["contamination"].to_pylist() == pytest.approx([26 / 52, 25 / 52, 0])
    apart = " ".join(words[:26]) + " y" * 500 + " " + " ".join(words[-26:])
    assert step.map(Texts([apart]))["contaminated"].to_pylist() == [False]  # found, but not together


def test_questions_of_three_words_are_not_looked_for_and_named():
    step = Contamination([EvaluationItem("s", "a", "Define entropy, please"), NEUTRON])
    assert [item.id for item in step.too_short] == ["a"]
    assert step.map(Texts(["Define entropy, please"]))["contaminated"].to_pylist() == [False]


def test_two_sets_are_both_named_and_their_spans_do_not_overlap():
    other = EvaluationItem("another", "7", "breakfast. How many doesn't she eat? I ask Aunt Agatha.")
    text = f"{DUCKS.question} I ask Aunt Agatha."
    table = Contamination([DUCKS, other]).map(Texts([text]))
    assert table["contaminated_by"].to_pylist() == [["another", "maths"]]
    first, second = table["contamination_spans"].to_pylist()[0]
    assert first["end"] <= second["start"]


def test_equal_questions_of_several_sets_are_one_question_of_each():
    again = [EvaluationItem(f"copy {i}", "0", DUCKS.question, DUCKS.answer) for i in range(8)]
    assert len(found(again, DUCKS.question)[0]) == 8


@pytest.mark.parametrize("texts", [[], [""], ["", "?!", "\ud800", "one"]])
def test_texts_of_nothing(texts):
    table = Contamination([DUCKS, NEUTRON]).map(Texts(texts))
    assert table["contaminated"].to_pylist() == [False] * len(texts)
    assert Contamination([]).map(Texts(texts)).num_rows == len(texts)


def test_it_is_a_step_and_its_settings_know_the_items():
    step: Step = Contamination([DUCKS])
    table = step.map(Texts(["x"]))
    assert list(table.column_names) == list(step.attributes)
    assert json.dumps(step.settings()) != json.dumps(Contamination([NEUTRON]).settings())


def test_a_text_is_the_same_whatever_else_is_in_the_batch(real, documents):
    items, step = real
    rng = random.Random(5)
    texts = [insert(d, rng.choice(items).question, rng) for d in rng.sample(documents, 40)]
    together = step.map(Texts(texts))
    assert together.equals(pa.concat_tables([step.map(Texts([text])) for text in texts]))


# --- the index against a plain search ----------------------------------------------------------

WORD = st.sampled_from("abc")
QUESTION = st.builds(
    lambda lead, tail: ["a"] * lead + tail, st.integers(0, 15), st.lists(WORD, min_size=4, max_size=12)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(QUESTION, min_size=1, max_size=8, unique_by=tuple),
    st.lists(st.one_of(QUESTION, st.lists(WORD, max_size=60)), min_size=1, max_size=4),
)
def test_the_index_finds_what_a_plain_search_finds(questions, texts):
    hashes = [words_of([" ".join(q)]).only.hashes for q in questions]
    words = words_of([" ".join(t) for t in texts]).only
    index = Index(hashes)
    hits = index.find(words)
    grams = [[tuple(q[i : i + min(13, len(q))]) for i in range(max(1, len(q) - 12))] for q in questions]
    common = {g for many in grams for g in many if sum(g in own for own in grams) > BOILERPLATE}
    telling, bare = [], []
    for own in grams:
        inside = {i + k for i, gram in enumerate(own) if gram in common for k in range(len(gram))}
        apart = {g for i, g in enumerate(own) if not inside & {i, i + len(g) - 1}} - common
        bare.append(not set(own) - common)
        telling.append(apart or set(own) - common or set(own))
    expected = {
        (int(words.offsets[t]) + i, number)
        for t, text in enumerate(texts)
        for number, own in enumerate(telling)
        for gram in own
        for i in range(len(text) - len(gram) + 1)
        if tuple(text[i : i + len(gram)]) == gram
    }
    assert set(zip(hits.first.tolist(), hits.question.tolist(), strict=True)) == expected
    assert index.boilerplate.tolist() == bare
    assert index.grams.tolist() == [len(own) for own in telling]


# --- the account -------------------------------------------------------------------------------


def test_the_account_adds_up_and_shows_the_worst_places_in_any_order():
    items = [DUCKS, NEUTRON, EvaluationItem("physics", "short", "Why?")]
    step = Contamination(items)
    texts = [
        FILLER,
        f"{FILLER}{DUCKS.question} {DUCKS.answer}",
        f"{FILLER}{DUCKS.question} {FILLER}",
        "What is a neutron?",
    ]
    files = {"maths": {"path": "maths.jsonl", "sha256": "abc"}}
    reports = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        account = Account(items, step.too_short, files)
        for i in order:
            account.add(step.map(Texts([texts[i]])), [texts[i]], [f"doc {i}"])
        reports.append(account.report())
    assert reports[0] == reports[1] == json.loads(json.dumps(reports[0]))
    report = reports[0]
    assert (report["documents"], report["contaminated_documents"]) == (4, 3)
    maths, physics = report["sets"]["maths"], report["sets"]["physics"]
    assert (maths["path"], maths["sha256"]) == ("maths.jsonl", "abc")
    assert (maths["items"], maths["found"], maths["found_with_answer"], maths["documents"]) == (1, 1, 1, 2)
    assert (physics["items"], physics["found"], physics["not_looked_for"]) == (2, 1, 1)
    assert (maths["contaminated"], physics["contaminated"]) == (["0"], ["n"])
    worst = maths["examples"][0]
    assert worst["document"] == "doc 1"
    assert worst["before"].endswith("becomes rope. ")
    assert worst["span"] == DUCKS.question.rstrip("?")
    assert re.match(r"\? She doesn't eat", worst["after"])


def test_a_question_in_many_documents_without_its_answer_is_named_a_commonplace():
    account = Account([NEUTRON])
    step = Contamination([NEUTRON])
    texts = [f"{FILLER}What is a neutron? {i}" for i in range(11)]
    account.add(step.map(Texts(texts[:10])), texts[:10], list("abcdefghij"))
    assert account.report()["sets"]["physics"]["commonplace"] == []
    account.add(step.map(Texts(texts[10:])), texts[10:], ["k"])
    assert account.report()["sets"]["physics"]["commonplace"] == ["n"]

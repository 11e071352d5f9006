"""Ablations: a rule that matters is found to, one that does not is not, and nothing is trained twice."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

import ropewalk as rw
from ropewalk.ablate import evaluation_name, figures_of
from ropewalk.cli import main
from ropewalk.data.leave_out import leave_out, nothing
from ropewalk.errors import UserError
from ropewalk.recipe import load_recipe, to_yaml
from ropewalk.recipe.schema import Clean

WORDS = "rope walk fibre strand twist long building loose strong spin lay yarn hemp tar sail mast".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789#%&"


def sentence(chance):
    """Words in an order that can be learned: each is followed by one of two."""
    place, words = chance.randrange(len(WORDS)), []
    for _ in range(30):
        words.append(WORDS[place])
        place = (place + chance.choice((1, 2))) % len(WORDS)
    return " ".join(words)


def garbage(chance):
    return "".join(chance.choice(LETTERS) for _ in range(300))


def write_rows(path: Path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


CONFIG = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def half_garbage(tmp_path, make_recipe, tiny_tokenizer_dir):
    """`half_garbage(steps, **data)`: a recipe from scratch; half of its training documents are garbage, and a
    rule drops those. A second rule drops one document in ten for no reason that matters."""
    chance = random.Random(0)
    texts = [make(chance) for _ in range(120) for make in (sentence, garbage)]
    path = write_rows(tmp_path / "train.jsonl", texts)

    def make(steps, **data):
        rules = {"real_words": "mean_word_length < 8", "chance": "id not like '%3'", "any": "words > 0"}
        data = {"train": [{"path": path}], "clean": {"keep": rules}, **data}
        model = {"config": CONFIG, "tokenizer": str(tiny_tokenizer_dir)}
        options = {"batch_size": 8, "micro_batch_size": 8, "self_check": False}
        return make_recipe(model=model, data=data, steps=steps, **options)

    return make


@pytest.fixture
def good(tmp_path):
    """Validation that a recipe names: sentences alone."""
    chance = random.Random(1)
    return [{"path": write_rows(tmp_path / "good.jsonl", [sentence(chance) for _ in range(40)])}]


@pytest.mark.slow
def test_a_rule_that_matters_is_told_from_one_that_does_not(half_garbage, good):
    recipe = half_garbage(40, validation=good)
    found = rw.ablate(recipe, without="real_words", progress=False)
    (loss,) = found.measures
    assert loss.measure == "loss on data.validation"
    assert loss.better is False, "leaving the rule out must be found to be worse"
    assert loss.mean > 0.5
    assert found.verdicts[0].endswith("(three seeds): real_words helps")
    assert found.tokens == 40 * 8 * 64
    kept, all_but = found.variants
    assert all_but.tokens > 3 * kept.tokens
    assert kept.epochs * kept.tokens == pytest.approx(all_but.epochs * all_but.tokens)

    again = rw.ablate(recipe, without="real_words", progress=False)
    assert (again.runs, again.measures) == (found.runs, found.measures), "runs that are there are found"

    other = rw.ablate(recipe, without="chance", progress=False)
    assert set(other.runs) & set(found.runs) == set(found.runs[::2]), "the runs with all rules are shared"
    (loss,) = other.measures
    assert loss.better is None
    assert loss.half_width > abs(loss.mean)
    assert "no difference that three seeds can show" in other.verdicts[0]
    kept_report = json.loads(other.report.with_suffix(".json").read_text())
    assert kept_report["verdicts"] == other.verdicts
    assert kept_report["measures"][0]["before"] == list(loss.before)
    assert other.verdicts[0] in other.report.read_text()


@pytest.mark.slow
def test_documents_split_off_are_the_same_for_both_and_no_run_has_seen_them(half_garbage, good):
    recipe = half_garbage(2, validation=[], validation_fraction=0.2)
    recipe["evaluate"] = {"perplexity": [good[0]["path"]]}
    found = rw.ablate(recipe, without="real_words", seeds=2, evaluate=True, progress=False)
    ruled, unruled, bits = found.measures
    assert bits.measure == "bits per byte of good.jsonl"
    for run, value in zip(
        found.runs, (bits.before[0], bits.after[0], bits.before[1], bits.after[1]), strict=True
    ):
        measured = rw.evaluate(run, name="again").perplexity[good[0]["path"]]
        assert measured.bits_per_byte == value
    assert "prepared with all rules" in ruled.measure
    assert "as they were read" in unruled.measure
    assert any("favours neither" in note for note in found.notes)
    for run in found.runs:
        ledger = _ledger(Path(json.loads((run / "lineage.json").read_text())["data"]["directory"]))
        trained = {row["hash"] for row in ledger if row["split"] == "train"}
        seed = load_recipe(run / "recipe.yaml").seed
        plain = load_recipe({**recipe, "seed": seed, "data": {**recipe["data"], "clean": {}}})
        held_out = {
            row["hash"] for row in _ledger(rw.prepare(plain).directory) if row["split"] == "validation"
        }
        assert held_out
        assert not trained & held_out


def test_an_evaluation_is_done_again_where_its_files_changed(half_garbage, good):
    recipe = {**half_garbage(2), "evaluate": {"perplexity": [good[0]["path"]]}}
    before, same = (evaluation_name(load_recipe(recipe)) for _ in range(2))
    with open(good[0]["path"], "a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    assert before == same != evaluation_name(load_recipe(recipe))


def test_files_of_one_name_are_two_measures():
    figures = {
        f"{folder}/{name}": {"bits_per_byte": i} for i, folder in enumerate("ab") for name in ("x", f"y{i}")
    }
    tasks = [{"name": "t", "scores": {"chrf": 3.0}}]
    assert figures_of({"perplexity": figures, "tasks": tasks}) == {
        "bits per byte of a/x": (0, True),
        "bits per byte of y0": (0, True),
        "bits per byte of b/x": (1, True),
        "bits per byte of y1": (1, True),
        "chrf of t": (3.0, False),
    }


def _ledger(directory):
    import pyarrow.parquet as pq

    return pq.read_table(directory / "documents.parquet").to_pylist()


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on_in_the_run_that_it_was_in(half_garbage, good, monkeypatch):
    import ropewalk.ablate as module
    from ropewalk.train import train

    recipe = half_garbage(4, validation=good)
    whole = rw.ablate(
        {**recipe, "runs": recipe["runs"] + "-whole"}, without="chance", seeds=2, progress=False
    )
    calls = []

    def stopping(recipe, **options):
        """The second run is killed after its first checkpoint."""
        calls.append(recipe.name)
        result = train(recipe, **options)
        if len(calls) == 2:
            (result.run / "report.md").unlink()
            return replace(result, interrupted=True)
        return result

    monkeypatch.setattr(module, "train", stopping)
    stopped = rw.ablate(recipe, without="chance", seeds=2, progress=False)
    assert (len(calls), stopped.measures) == (2, ())
    assert stopped.interrupted.name.startswith("tiny.without-chance.seed3-")
    found = rw.ablate(recipe, without="chance", seeds=2, progress=False)
    assert len(calls) == 4, "one run was finished, one went on, two were trained"
    assert found.runs[1] == stopped.interrupted
    assert [one.before + one.after for one in found.measures] == [
        one.before + one.after for one in whole.measures
    ]


def test_a_rule_that_changes_no_document_is_not_trained_for(half_garbage, good):
    found = rw.ablate(half_garbage(10**9, validation=good), without="any", progress=False)
    assert (found.measures, found.runs) == ((), ())
    assert found.notes == ("leaving any out changes no training document: there is nothing to compare",)
    assert found.report.exists()


def test_the_command_says_the_sentences_and_where_the_report_is(half_garbage, good, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(load_recipe(half_garbage(10**9, validation=good))))
    words = ["data", "ablate", str(recipe), "--without", "any"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "note: leaving any out changes no training document" in out
    assert f"report: {tmp_path / 'runs' / 'tiny.without-any.md'}" in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"] == []
    assert main([*words[:-1], "all"]) == 2
    assert "--without all: there is nothing of that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"without": "real_word"}, r"--without real_word: .* did you mean real_words\?"),
        ({}, {"without": "chance", "seeds": 1}, "give at least 2"),
        ({"train": {"epochs": 1}}, {"without": "chance"}, "give train.tokens=N instead"),
        ({}, {"without": "chance", "evaluate": True}, "neither perplexity nor tasks"),
        ({"data": {"validation_fraction": 0.0}}, {"without": "chance"}, "nothing to measure on"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(half_garbage, changes, options, said):
    recipe = half_garbage(10**9)
    recipe["data"] |= changes.get("data", {})
    if "train" in changes:
        recipe["train"] = {**changes["train"], "batch_size": 8}
    with pytest.raises(UserError, match=said):
        rw.ablate(recipe, progress=False, **options)


def test_a_small_model_takes_the_place_of_the_recipes(make_recipe):
    from ropewalk.ablate import _with_model

    recipe = load_recipe(make_recipe(adapt={"method": "lora"}, data={"clean": {"rules": ["gopher"]}}))
    small = _with_model(recipe, "small")
    assert small.model.source is None
    assert small.model.tokenizer == recipe.model.source
    assert small.model.config["vocab_size"] == 384
    assert small.adapt.method == "full", "there is nothing to adapt"
    assert (small.data, small.train) == (recipe.data, recipe.train)


# --- what is left out ------------------------------------------------------------------------


def clean(**values):
    return {**Clean().model_dump(), **values}


def test_an_own_rule_goes_and_a_published_one_is_left_out_by_null():
    own = clean(keep={"mine": "words > 5", "other": "lines > 1"})
    assert leave_out(own, "mine")["keep"] == {"other": "lines > 1"}
    preset = clean(rules=("gopher",), keep={"gopher_words": "words > 5"})
    assert leave_out(preset, "gopher_words")["keep"] == {"gopher_words": None}
    assert leave_out(preset, "gopher_letters")["keep"] == {
        "gopher_words": "words > 5",
        "gopher_letters": None,
    }
    with pytest.raises(UserError, match="nothing of that name"):
        leave_out(leave_out(preset, "gopher_words"), "gopher_words")


def test_sets_of_rules_and_what_is_done_to_texts():
    asked = clean(rules=("gopher", "c4"), duplicates=("exact", "near"), pii="mask", against=("x.jsonl",))
    assert leave_out(asked, "gopher")["rules"] == ("c4",)
    assert leave_out(asked, "near")["duplicates"] == ("exact",)
    assert leave_out(asked, "pii")["pii"] == "keep"
    assert leave_out(asked, "against")["against"] == ()
    assert nothing({**asked, "repair": True}) == clean(repair=True)
    with pytest.raises(UserError, match="asks for nothing"):
        leave_out(clean(), "pii")

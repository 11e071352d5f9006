"""`ropewalk data` and `prepare --profile` on a recipe: what is printed, and what a mistake costs."""

import json

import pytest

from ropewalk.cli import main


@pytest.fixture
def recipe(tmp_path, tiny_tokenizer_dir, monkeypatch):
    """Forty texts of 1 to 40 words, one with an escape sequence; those with 10 words or more are kept."""
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(["rope"] * n) + f" {n}" for n in range(40)]
    texts[20] += " \x1b[31mred"
    tmp_path.joinpath("texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tmp_path.joinpath("recipe.yaml").write_text(
        f"""
name: look
model: {{config: {{model_type: llama}}, tokenizer: {tiny_tokenizer_dir}}}
train: {{steps: 1}}
data:
  train: [{{path: texts.jsonl}}]
  sequence_length: 128
  workers: 1
  clean: {{keep: {{short: words >= 10}}}}
"""
    )
    return "recipe.yaml"


def answer(capsys, *words):
    status = main(["data", *words])
    out = capsys.readouterr().out
    return status, out


def test_rules_are_judged_before_anything_is_tokenized(recipe, capsys, tmp_path):
    status, out = answer(capsys, "rules", recipe, "--json")
    found = json.loads(out)
    assert (status, found["documents"], found["kept"]) == (0, 40, 31)
    assert not list(tmp_path.glob("prepared/texts-*"))
    _, out = answer(capsys, "rules", recipe, "data.clean.keep.short=words >= 30")
    assert out.startswith("11 of 40 documents are kept")
    assert "words >= 30" in out


def test_documents_are_shown_with_why(recipe, capsys):
    _, out = answer(capsys, "look", recipe, "--rule", "short", "--sample", "2")
    assert "dropped by short: the recipe's own rule (keeps words >= 10)\nwords = " in out
    assert out.rstrip().endswith("2 of 9 that match, of 40")
    _, out = answer(capsys, "look", recipe, "--search", "red")
    assert "»red«" in out
    assert "\x1b" not in out, "what is in a document does nothing to the terminal"
    assert "␛[31m" in out


def test_an_attribute_that_no_rule_asks_for_can_be_asked_about(recipe, capsys):
    _, out = answer(capsys, "look", recipe, "--where", "duplicate_lines = 0 and words = 5", "--json")
    assert [d["values"] for d in json.loads(out)["documents"]] == [{"duplicate_lines": 0.0, "words": 5}]
    assert main(["data", "look", recipe, "--where", "words <"]) == 2
    assert "expression 'words <': syntax error" in capsys.readouterr().err, "it is no rule"


def test_tokens_are_shown_with_what_is_scored(recipe, capsys):
    _, out = answer(capsys, "look", recipe, "--tokens", "--id", "texts.jsonl:13")
    assert "|<|im_end|>" in out
    assert "tokens, " in out


def test_prepared_data_is_profiled_looked_at_and_compared(recipe, capsys, tmp_path):
    assert main(["prepare", recipe, "--profile"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith(("problem: ", "warning: ", "note: ")) for line in out[1:])
    assert (tmp_path / out[0] / "profile.html").is_file()
    _, looked = answer(capsys, "look", out[0], "--where", "tokens > 10", "--kept", "--json")
    assert json.loads(looked)["matching"] > 0
    assert main(["prepare", recipe, "data.clean.keep.short=words >= 20"]) == 0
    other = capsys.readouterr().out.splitlines()[0]
    _, compared = answer(capsys, "compare", recipe, other, "--out", "compared.html")
    assert "only in A: 10 documents" in compared
    assert "in B: dropped by short" in compared
    assert (tmp_path / "compared.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["look", "recipe.yaml", "--kept", "--dropped"], "--kept and --dropped: give one of them"),
        (["look", "nowhere"], "nowhere"),
        (["look", ".", "--tokens"], "prepared.json"),
        (["compare", "recipe.yaml", "recipe.yaml"], "not prepared yet; run ropewalk prepare"),
    ],
)
def test_mistakes_cost_one_line(recipe, capsys, words, message):
    assert main(["data", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error

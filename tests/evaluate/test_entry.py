"""`ropewalk eval`: everything the recipe asks for, on a real (tiny) model, kept in two files."""

import json

import pytest

import ropewalk
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.evaluate import evaluate, run_panel
from ropewalk.model import load_model, load_tokenizer


@pytest.fixture
def recipe(tiny_llama_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The ropewalk is a long straight building. " * 8)
    rows = tmp_path / "task.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"The {i}", "completion": "rope"}) + "\n" for i in range(3))
    )
    return {
        "name": "tiny",
        "model": {"source": str(tiny_llama_dir)},
        "data": {"train": [{"path": str(rows)}], "sequence_length": 64},
        "train": {"steps": 1, "precision": "float32", "device": "cpu"},
        "evaluate": {
            "perplexity": [str(text)],
            "tasks": [{"name": "ropes", "path": str(rows), "max_new_tokens": 4}],
            "base": [{"name": "ropes-base", "path": str(rows), "max_new_tokens": 4, "limit": 2}],
            "prompts": ["What is a rope?"],
            "max_new_tokens": 5,
        },
    }


def test_everything_is_measured_and_written(recipe, tmp_path):
    told = []
    result = evaluate(recipe=recipe, directory=tmp_path, progress=lambda *a: told.append(a))
    assert [task.name for task in result.tasks] == ["ropes"]
    assert ("ropes", 3, 3) in told
    assert any(what == "perplexity of text.txt" for what, _, _ in told)
    written = json.loads((tmp_path / "evaluation-base.json").read_text())
    assert written == json.loads(json.dumps(result.as_dict()))
    assert len(written["tasks"][0]["rows"]) == 3
    assert written["perplexity"][recipe["evaluate"]["perplexity"][0]]["window"] == 64
    assert written["panel"][0]["prompt"] == "What is a rope?"
    page = (tmp_path / "evaluation-base.md").read_text()
    assert f"| exact_match | ropes (3 rows, 0-shot) | {result.tasks[0].scores['exact_match']:.2f} |" in page
    assert "**What is a rope?**" in page
    with pytest.raises(UserError, match=r"evaluation-base.json exists; give --overwrite"):
        evaluate(recipe=recipe, directory=tmp_path)
    evaluate(recipe=recipe, directory=tmp_path, overwrite=True)


def test_the_base_is_asked_with_the_recipes_chat_template(recipe, tmp_path):
    """The template that the tuned model is trained with; else base and tuned are asked different things."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}go on:")
    before = evaluate(recipe=recipe, base=True).tasks[0].rows
    recipe["data"]["chat_template"] = str(template)
    assert [r["answer"] for r in evaluate(recipe=recipe, base=True).tasks[0].rows] != [
        r["answer"] for r in before
    ]


def test_the_base_gets_its_own_prompts_and_a_loaded_model_is_used(recipe, tiny_llama_dir, monkeypatch):
    loaded = (load_model(tiny_llama_dir), load_tokenizer(tiny_llama_dir))
    monkeypatch.setattr("ropewalk.evaluate.entry.load_model", lambda *a, **k: pytest.fail("loaded twice"))
    result = ropewalk.evaluate(recipe=recipe, base=True, loaded=loaded)
    assert [(task.name, len(task.rows)) for task in result.tasks] == [("ropes-base", 2)]


def test_a_run_is_measured_by_its_own_recipe_into_its_own_folder(recipe, tiny_llama_dir, tmp_path):
    import yaml

    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = (load_model(tiny_llama_dir), load_tokenizer(tiny_llama_dir))
    result = evaluate(run, loaded=loaded)
    assert result.name == "tiny-1"
    assert (run / "evaluation-tiny-1.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity": [], "tasks": [], "prompts": []}, "evaluate section is empty"),
        ({"perplexity": ["/nowhere/x.txt"]}, "/nowhere/x.txt: no such file.*evaluate.perplexity"),
        (
            {"tasks": [{"name": "t", "path": "/nowhere/x.jsonl"}]},
            "x.jsonl: no such file.*path of task t",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_model_is_loaded(recipe, monkeypatch, change, message):
    monkeypatch.setattr("ropewalk.evaluate.entry.load_model", lambda *a, **k: pytest.fail("loaded"))
    recipe["evaluate"].update(change)
    with pytest.raises(UserError, match=message):
        evaluate(recipe=recipe)


def test_a_model_without_a_recipe_is_refused(tiny_llama_dir):
    with pytest.raises(UserError, match="give the recipe that says what to measure"):
        evaluate(tiny_llama_dir)


def test_the_panel_asks_a_chat_model_and_continues_for_another(tiny_llama_dir):
    model, tokenizer = load_model(tiny_llama_dir), load_tokenizer(tiny_llama_dir)
    chat = run_panel(model, tokenizer, ["The rope", "is"], max_new_tokens=6)
    assert [sample.prompt for sample in chat] == ["The rope", "is"]
    tokenizer.chat_template = None
    plain = run_panel(model, tokenizer, ["The rope", "is"], max_new_tokens=6)
    assert plain != chat


def test_an_evaluation_of_prompts_alone_shows_their_answers_and_no_empty_table(recipe, tmp_path, capsys):
    import yaml

    recipe["evaluate"] = {"prompts": ["The rope"], "max_new_tokens": 4}
    path = tmp_path / "panel.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["eval", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("**The rope**\n\n>")
    assert "| measure |" not in said
    page = evaluate(recipe=recipe).markdown()
    assert "| measure |" not in page
    assert "## Prompt panel\n\n**The rope**" in page


def test_a_name_is_no_path_and_no_pattern(recipe, tmp_path):
    with pytest.raises(UserError, match=r"--name \.\./x: the name of a file in the run's folder"):
        evaluate(recipe=recipe, directory=tmp_path, name="../x")
    recipe["evaluate"] = {"prompts": ["The rope"], "max_new_tokens": 1}
    evaluate(recipe=recipe, directory=tmp_path, name="[a]")
    with pytest.raises(UserError, match="exists; give --overwrite"):
        evaluate(recipe=recipe, directory=tmp_path, name="[a]")

"""What a recipe's YAML means, and what overrides do to it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.recipe import Recipe, load_recipe, load_with_origins, to_yaml

BASE = {
    "name": "x",
    "model": {"source": "folder"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "train": {"steps": 100},
}


def from_text(tmp_path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def small(name="x", train="steps: 100", more="") -> str:
    return (
        f"name: {name}\nmodel: {{source: folder}}\ndata: {{train: [{{path: a}}]}}\ntrain: {{{train}}}\n{more}"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("5e+2", 500.0),
        (".5", 0.5),
        ("1_000.0", 1000.0),
        ("3", 3.0),
        ("'2e-5'", 2e-5),
    ],
)
def test_numbers_are_numbers(tmp_path, text, value):
    """YAML 1.1, and so PyYAML, reads 1e-4 as text."""
    recipe = from_text(tmp_path, small(train=f"steps: 1, optimizer: {{learning_rate: {text}}}"))
    assert recipe.train.optimizer.learning_rate == value


@pytest.mark.parametrize(("text", "value"), [("1_000_000", 10**6), ("1e6", 10**6), ("010", 10), ("0x10", 16)])
def test_whole_numbers(tmp_path, text, value):
    assert from_text(tmp_path, small(train=f"steps: {text}")).train.steps == value


@pytest.mark.parametrize(
    "text", ["no", "off", "y", "2024", "1e5", "007", "true", "1.50", "2024-01-01", "1:30", ".inf"]
)
def test_text_is_text_as_it_was_written(tmp_path, text):
    """`no` is no boolean and a commit's hash no number; `null` alone is nothing."""
    recipe = from_text(tmp_path, small().replace("source: folder", f"source: folder, revision: {text}"))
    assert recipe.model.revision == text
    assert load_recipe(BASE, [f"model.revision={text}"]).model.revision == text


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("yes", True), ("on", True), ("no", False), ("off", False)]
)
def test_switches_take_the_words_people_use(tmp_path, text, value):
    assert from_text(tmp_path, small(train=f"steps: 1, compile: {text}")).train.compile is value


def test_an_empty_section_is_empty(tmp_path):
    assert from_text(tmp_path, small(more="evaluate:\nadapt:\n")).adapt.method == "full"


def test_json_is_yaml(tmp_path):
    import json

    assert from_text(tmp_path, json.dumps(BASE)) == load_recipe(BASE)


def test_anchors_and_merges(tmp_path):
    text = small(more="evaluate:\n  tasks:\n    - &t {name: a, path: p, limit: 3}\n    - {<<: *t, name: b}\n")
    first, second = from_text(tmp_path, text).evaluate.tasks
    assert (first.name, second.name, second.path, second.limit) == ("a", "b", "p", 3)


def test_relative_paths_stay_relative_to_the_current_directory(tmp_path):
    assert from_text(tmp_path, small()).data.train[0].path == "a"


def test_paths_in_a_dictionary_may_be_path_objects():
    values = {**BASE, "data": {"train": [{"path": Path("folder/a.jsonl")}]}}
    assert load_recipe(values).data.train[0].path == "folder/a.jsonl"


def test_overrides():
    recipe = load_recipe(
        BASE,
        [
            "train.steps=5",
            "train.optimizer.learning_rate=1e-3",
            "data.train.0.path=b c.jsonl",
            "data.train.1.path=more",  # one past the end appends
            "data.train.1.text=off",
            "adapt.targets=[q_proj, v_proj]",
            "evaluate.tasks.0.name=t",
            "evaluate.tasks.0.path=p",
            "evaluate.tasks.0.instruction=Answer: yes or no # please",
            "evaluate.prompts=[one, 'two, three']",
            "adapt={method: lora, rank: 4}",
            "adapt.rank=8",
            "train.schedule={name: linear}",
        ],
    )
    assert recipe.train.steps == 5
    assert recipe.train.optimizer.learning_rate == 1e-3
    assert [source.path for source in recipe.data.train] == ["b c.jsonl", "more"]
    assert recipe.data.train[1].text == "off"
    assert recipe.evaluate.tasks[0].instruction == "Answer: yes or no # please"
    assert recipe.evaluate.prompts == ("one", "two, three")
    assert (recipe.adapt.method, recipe.adapt.rank, recipe.adapt.targets) == ("lora", 8, "all-linear")
    assert recipe.train.schedule.name == "linear"


def test_an_empty_override_unsets():
    assert (
        load_recipe({**BASE, "model": {"source": "a", "revision": "r"}}, ["model.revision="]).model.revision
        is None
    )


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("train.epochs=2", (None, 2.0, None)),
        ("train.tokens=10", (None, None, 10)),
        ("train.steps=7", (7, None, None)),
    ],
)
def test_an_override_takes_the_place_of_what_excludes_it(override, left):
    """A recipe with `steps` is run for two epochs by saying so: no need to unset steps."""
    train = load_recipe(BASE, [override]).train
    assert (train.steps, train.epochs, train.tokens) == left


def test_a_recipe_can_be_overridden_again():
    recipe = load_recipe(BASE)
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, ["train.batch_size=3"]).train.batch_size == 3


def test_origins_name_lines_and_overrides(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(small(more="seed: 3\n"))
    _, origins = load_with_origins(path, ["train.batch_size=4"])
    assert (origins["seed"].kind, origins["seed"].where) == ("file", f"{path}:5")
    assert (origins["train.batch_size"].kind, origins["train.batch_size"].where) == (
        "override",
        "override train.batch_size=4",
    )
    assert "train.clip" not in origins


# --- there and back --------------------------------------------------------------------------

text = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=30
)
awkward = st.sampled_from(
    [
        "no",
        "1e-4",
        "1.0",
        "~",
        "null",
        "true",
        "-",
        "a: b",
        "a #b",
        " x ",
        "2024-01-01",
        "",
        "|\n x",
        "0x1F",
        "1_0",
    ]
)
either = text | awkward


@settings(max_examples=200, deadline=None)
@given(
    source=either,
    prompts=st.lists(either.filter(str.strip), max_size=3),
    rate=st.floats(1e-12, 1e3),
    config=st.none() | either,
)
def test_yaml_of_a_recipe_reloads_equal(tmp_path_factory, source, prompts, rate, config):
    model = (
        {"source": source}
        if config is None
        else {"config": {"hidden_act": config, "eps": rate}, "tokenizer": source}
    )
    values = {
        **BASE,
        "model": model,
        "train": {"steps": 1, "optimizer": {"learning_rate": rate}},
        "evaluate": {"prompts": prompts},
    }
    recipe = Recipe.model_validate(values)
    path = tmp_path_factory.mktemp("there") / "back.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe

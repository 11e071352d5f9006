"""Every mistake in a recipe costs one message that names the key, the line, and the closest right thing."""

from pathlib import Path

import pytest

from ropewalk.errors import UserError
from ropewalk.recipe import load_recipe

GOOD = """\
name: x
model:
  source: folder
data:
  train:
    - path: a.jsonl
  sequence_length: 512
train:
  steps: 100
  optimizer:
    learning_rate: 1e-4
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "x.yaml") -> str:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return write


def message(source, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def test_the_example_of_the_design(write):
    path = write(GOOD.replace("  optimizer:\n    learning_rate", "  learning_rat"))
    assert message(path) == (
        "train.learning_rat: unknown key; did you mean train.optimizer.learning_rate? (x.yaml:10)"
    )


@pytest.mark.parametrize(
    ("line", "changed", "expected"),
    [
        (
            "name: x",
            "name: a b",
            'name: must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, not "a b" (x.yaml:1)',
        ),
        (
            "  steps: 100",
            "  steps: eight",
            'train.steps: must be a whole number above 0, not "eight" (x.yaml:9)',
        ),
        ("  steps: 100", "  steps: 0", "train.steps: must be a whole number above 0, not 0 (x.yaml:9)"),
        ("  steps: 100", "  steps: true", "train.steps: must be a whole number above 0, not true (x.yaml:9)"),
        ("  steps: 100", "  steps: 1.5", "train.steps: must be a whole number above 0, not 1.5 (x.yaml:9)"),
        ("  steps: 100", "  steps: [1]", "train.steps: must be a whole number above 0, not [1] (x.yaml:9)"),
        (
            "  steps: 100",
            "  steps: 100\n  precision: bf16",
            "train.precision: must be one of auto, float32, bfloat16, float8, "
            'not "bf16"; did you mean bfloat16?',
        ),
        (
            "learning_rate: 1e-4",
            "learning_rate: .nan",
            "train.optimizer.learning_rate: must be a number above 0, not NaN",
        ),
        (
            "learning_rate: 1e-4",
            "learning_rate: -1",
            "train.optimizer.learning_rate: must be a number above 0, not -1",
        ),
        ("    - path: a.jsonl", "    - text: t", "data.train.0.path: missing (A file (JSONL"),
        (
            "    - path: a.jsonl",
            "    - pth: t",
            "data.train.0.pth: unknown key; did you mean data.train.0.path? (x.yaml:6)",
        ),
        (
            "    - path: a.jsonl",
            "    path: a.jsonl",
            "data.train: must be a list, each item a section with path, name",
        ),
        (
            "  source: folder",
            "  sorce: folder",
            "model.sorce: unknown key; did you mean model.source? (x.yaml:3)",
        ),
        (
            "  source: folder",
            "  revision: abc",
            "model: give exactly one of model.source (a pretrained model)",
        ),
        (
            "  steps: 100",
            "  steps: 100\n  epochs: 2",
            "train: give exactly one of train.steps, train.epochs and train.tokens",
        ),
        ("  steps: 100", "  steps: 100\n  steps: 3", "train.steps: given twice, first on line 9 (x.yaml:10)"),
        (
            "  steps: 100",
            "  steps: !!python/name:os.system 1",
            "train.steps: the tag !!python/name:os.system is not",
        ),
        ("  steps: 100", "  steps: 100\n  zzqqy: 1", "train.zzqqy: unknown key (x.yaml:10)"),
        (
            "  steps: 100",
            "  steps: 100\n  lr: 1",
            "train.lr: unknown key; did you mean train.optimizer.learning_rate?",
        ),
        ("name: x", "name: x\nepochs: 3", "epochs: unknown key; did you mean train.epochs? (x.yaml:2)"),
        ("name: x", "name: x\ntrian: {}", "trian: unknown key; did you mean train? (x.yaml:2)"),
        ("name: x", "? [a, b]\n: 1\nname: x", "a key must be text (x.yaml:1)"),
        ("name: x", "name: {a: 1}", "name: must be text that matches"),
        ("    - path: a.jsonl", "    - path: {a: 1}", "data.train.0.path: must be text, not a section"),
        (
            "    - path: a.jsonl",
            "    - path:\n        a: 1",
            "data.train.0.path: must be text, not a section",
        ),
        (
            "  sequence_length: 512",
            "  clean: {keep: {short: [1]}}",
            "data.clean.keep.short: must be text, not [1] (x.yaml:7)",
        ),
        (
            "  sequence_length: 512",
            "  clean: {rules: [gofer]}",
            "data.clean.rules.0: must be one of gopher, gopher_repetition, c4, fineweb, "
            'not "gofer"; did you mean gopher? (x.yaml:7)',
        ),
    ],
)
def test_one_mistake_one_line(write, line, changed, expected):
    assert line in GOOD
    found = message(write(GOOD.replace(line, changed)))
    assert found.startswith(expected)
    assert "x.yaml" in found
    assert "\n" not in found
    assert "pydantic" not in found


def test_all_mistakes_are_in_one_message(write):
    path = write("name: x\nmodel: {sorce: a}\ndata:\n  train: 3\ntrain: {steps: no, clip: -1}\n")
    lines = message(path).splitlines()
    assert lines[0].startswith("x.yaml: ")
    assert lines[0].split(": ")[1] == f"{len(lines) - 1} problems"
    for start in ("  model.sorce:", "  data.train:", "  train.steps:", "  train.clip:"):
        assert sum(line.startswith(start) for line in lines) == 1
    assert all("(x.yaml:" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml is empty"),
        ("# only a comment\n", "x.yaml is empty"),
        ("- a\n- b\n", "the top level must be keys (name:, model:, data:, train:), not a list (x.yaml:1)"),
        ("hello", "the top level must be keys (name:, model:, data:, train:), not plain text (x.yaml:1)"),
        ("name: x\nmodel: {source: a\ndata: 3\n", "broken YAML:"),
        ("name: x\n\tmodel: 3\n", "broken YAML:"),
        ("name: 'x\n", "broken YAML:"),
        ("name: *nothing\n", "broken YAML:"),
        ("a: &a [*a]\n", "x.yaml: too deep or too large"),
        ("name: x\n--- \nname: y\n", "broken YAML:"),
        (b"\x80\x81\x82", "x.yaml: not UTF-8 text (at byte 0)"),
        (b"name: \x00\x01", "broken YAML:"),
        (b"x" * 2_000_000, "x.yaml has 2,000,000 bytes"),
    ],
)
def test_what_is_no_recipe(write, text, expected):
    found = message(write(text))
    assert found.startswith(expected)
    assert "\n" not in found
    assert "x.yaml" in found


def test_broken_yaml_hints_at_the_usual_causes(write):
    assert "a tab is no indentation" in message(write("name: x\n\tmodel: 3\n"))
    assert "needs quotes (x.yaml:1, column 8)" in message(write("name: a: b\n"))


def test_broken_yaml_says_line_and_column(write):
    assert message(write("name: x\nmodel: ]\n")).endswith("(x.yaml:2, column 8)")


def test_many_aliases_do_not_take_the_machine(write):
    """A "billion laughs" file is refused before it is expanded."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too deep or too large" in message(write("\n".join(lines)))


def test_missing_file_names_the_closest(write):
    write(GOOD, "quickstart.yaml")
    assert message("quikstart.yaml") == "quikstart.yaml: no such file; did you mean quickstart.yaml?"
    assert message(".") == ". is a folder; a recipe is a YAML file"
    assert message("") == ". is a folder; a recipe is a YAML file"


def test_nothing_but_a_name(write):
    lines = message(write("name: x\n")).splitlines()
    assert [line.strip().split(":")[0] for line in lines[1:]] == ["model", "data", "train"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "train.steps: an override is written key=value, for example train.steps=100"),
        ("=3", "=3: an override is written key=value"),
        ("train..steps=3", "train..steps=3: an override is written key=value"),
        (
            "data.train.²=x",
            "data.train.²: data.train is a list; say which item, as in data.train.0 (override",
        ),
        ("seed=-1", "seed: must be a whole number at least 0 and below 4,294,967,296, not -1 (override"),
        (
            "evaluate.tasks=[{name: t, path: p, metrics: []}]",
            "evaluate.tasks.0.metrics: must be a list, each item one of exact_match, chrf, rouge_l, "
            "at least one of them, not [] (override",
        ),
        ('evaluate.prompts=[" "]', "evaluate.prompts.0: must be text that matches"),
        ("trian.steps=3", "trian: unknown key; did you mean train? (override trian.steps=3)"),
        ("train.stps=3", "train.stps: unknown key; did you mean train.steps? (override train.stps=3)"),
        ("train.steps=x", 'train.steps: must be a whole number above 0, not "x" (override train.steps=x)'),
        ("train.steps.x=3", "train.steps.x: train.steps is a single value; it has no x (override"),
        (
            "data.train.path=b",
            "data.train.path: data.train is a list; say which item, as in data.train.0 (override",
        ),
        (
            "data.train.4.path=b",
            "data.train.4.path: data.train has 1 items (the first is data.train.0) (override",
        ),
        ("data.train.0.pth=b", "data.train.0.pth: unknown key; did you mean data.train.0.path? (override"),
    ],
)
def test_wrong_overrides(write, override, expected):
    assert message(write(GOOD), [override]).startswith(expected)


def test_what_an_override_replaces_is_not_taken_for_its_text(write):
    path = write(GOOD.replace("a.jsonl", "2024"))
    assert message(path, ["data.train=[{path: [1]}]"]).startswith("data.train.0.path: must be text, not [1]")


def test_a_dictionary_gets_the_same_messages():
    values = {"name": "x", "model": {"source": "a"}, "data": {"train": [{"path": "b"}]}, "train": {"stps": 1}}
    assert message(values) == "train.stps: unknown key; did you mean train.steps?"


def test_a_frozen_recipe_stays_as_it_is(write):
    recipe = load_recipe(write(GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "{train: [{path: a, weight: 2}, {path: b}]}",
            "give every source of data.train a weight or none; b has none",
        ),
        (
            "{train: [{path: a, weight: 2}], temperature: 2}",
            "give weights of sources or data.temperature, not both",
        ),
        ("{train: [{path: a, weight: 0}]}", "data.train.0.weight"),
        ("{train: [{path: a}], temperature: 0.5}", "data.temperature"),
        ("{train: [{path: a}], validation: [{path: b, weight: 1}]}", "data.validation.0.weight: unknown key"),
    ],
)
def test_mixtures_that_say_too_little_or_too_much(write, data, said):
    text = f"name: x\nmodel: {{source: folder}}\ndata: {data}\ntrain: {{steps: 1}}\n"
    found = message(write(text))
    assert said in found
    assert "x.yaml:3" in found

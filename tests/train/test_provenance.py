"""From a step to its documents' lines in their files, and from a document to the steps that see it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import UserError
from ropewalk.train.provenance import Provenance

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def run(make_recipe: Make, tmp_path: Path) -> Path:
    """Four steps of two rows, of two mixed sources whose documents are split, and some dropped."""
    paths = []
    for name, count in (("many", 30), ("few", 5)):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"text": f"{name} {i} " + "rope walk strand fibre " * (1 + i % 9)} for i in range(count)]
        path.write_text("\n\n".join(map(json.dumps, lines)))  # every second line is blank
        paths.append({"path": str(path), "weight": 1})
    clean = {"keep": {"not_seven": "not ends_with(id, ':13')"}}
    data = {"train": paths, "sequence_length": 32, "clean": clean}
    return Path(rw.train(make_recipe(data=data, steps=4, batch_size=2), progress=False).run)


def test_a_step_lists_the_documents_of_its_rows_with_their_lines(run: Path) -> None:
    provenance = Provenance.open(run)
    loader = provenance.loader
    assert loader is not None
    for step in range(1, 5):
        found = provenance.trace(step).to_pylist()
        batch = loader.batch((step - 1) * 2, 2)
        rows = [[d["id"] for d in found if d["row"] == row] for row in range(2)]
        whole = [[name.split("#")[0] for name in names] for names in batch.documents]
        assert rows == whole
        for document in found:
            line = int(document["id"].split(":")[1])
            assert document["line"] == line
            text = json.loads((run.parents[1] / document["file"]).read_text().splitlines()[line - 1])["text"]
            assert text.startswith(document["source"].split(".")[0])
        for row in range(2):
            tokens = sum(d["tokens"] for d in found if d["row"] == row)
            assert tokens == int((batch.segments[row] >= 0).sum())


def test_a_document_says_what_became_of_it_and_which_steps_see_it(run: Path) -> None:
    provenance = Provenance.open(run)
    ledger = provenance.sql("SELECT id, verdict, split FROM documents").to_pylist()
    assert len(ledger) == 35
    seen = {step: set(provenance.trace(step)["id"].to_pylist()) for step in range(1, 5)}
    assert any(seen.values())
    for document in ledger:
        found = provenance.where(document["id"])
        assert found["steps"] == ([s for s in seen if document["id"] in seen[s]] or None)
        assert found["verdict"] == ("not_seven" if document["id"].endswith(":13") else None)
        assert (found["split"] is None) == (found["verdict"] is not None)


def test_the_commands_print_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "trace", str(run), "--step", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {d["step"] for d in found} == {2}
    assert main(["data", "where", str(run), found[0]["id"], "--json"]) == 0
    assert 2 in json.loads(capsys.readouterr().out)["steps"]
    assert main(["data", "where", str(run), "many.jsonl:13"]) == 0
    assert "not_seven" in capsys.readouterr().out
    assert main(["data", "trace", str(run), "--sql", "SELECT count(*) AS n FROM steps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n"] > 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "RUN", "--step", "5"], "--step 5: the run has the steps 1 to 4"),
        (["trace", "RUN"], "give one of --step and --sql"),
        (["trace", "RUN", "--sql", "SELECT x FROM steps"], "--sql: "),
        (["trace", "RUN", "--sql", "SELECT * FROM read_text('/etc/hostname')"], "--sql: "),
        (["where", "RUN", "many.jsonl:2"], "many.jsonl:2: no such document"),
    ],
)
def test_a_mistake_is_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: {message}")


def test_what_is_neither_a_run_nor_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Provenance.open(tmp_path)


def test_a_query_that_is_empty_is_refused(run: Path) -> None:
    provenance = Provenance.open(run)
    for query in ("", "-- nothing"):
        with pytest.raises(UserError, match="--sql: gives no table; ask with SELECT"):
            provenance.sql(query)

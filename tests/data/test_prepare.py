"""From files to shards: what is kept, what is left out and said, and nothing done twice or half."""

import json
import logging
import re
import sys
from itertools import chain
from pathlib import Path

import pytest

from ropewalk.clean.rules import Rule, columns_of, parsed
from ropewalk.data.cleaning import Plan
from ropewalk.data.encode import Options
from ropewalk.data.entry import name_sources, prepare, prepare_sources
from ropewalk.errors import RopewalkError, UserError

WORDS = "rope walk loose fibre strand long building strong end laid".split()


def rows(count, start=0):
    return [
        {"text": f"{i} " + " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 4 + i % 7))}
        for i in range(start, start + count)
    ]


def jsonl(items):
    return "\n".join(json.dumps(item) for item in items)


def talk(user="Hello", assistant="Hi there."):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture
def run(tokenizers, tmp_path):
    """run(*paths, style="chatml", validation=(), workers=1, ..., options) prepares below tmp_path/out."""

    def run(*paths, style="chatml", validation=(), workers=1, overwrite=False, progress=None, **options):
        parts = [
            name_sources([p if isinstance(p, dict) else {"path": str(p)} for p in part])
            for part in (paths, validation)
        ]
        return prepare_sources(
            *parts,
            tokenizers[style],
            Options(**{"sequence_length": 64, **options}),
            tmp_path / "out",
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )

    return run


def made(folder):
    """The data sets in a folder, and leftovers, if there are."""
    return sorted(p.name for p in folder.iterdir() if p.name != "parts")


def ids_of(shards):
    return [shards.document(i).id for i in range(len(shards))] if shards is not None else []


def test_texts_become_the_tokens_of_their_texts(run, write, tokenizers):
    items = rows(20)
    prepared = run(write("a.jsonl", jsonl(items)))
    assert prepared.validation is None
    assert ids_of(prepared.train) == [f"a.jsonl:{i}" for i in range(1, 21)]
    for i, item in enumerate(items):
        document = prepared.train.document(i)
        assert document.tokens.tolist() == [*tokenizers["chatml"](item["text"])["input_ids"], 2]
        assert document.scored.tolist() == [False] + [True] * (len(document.tokens) - 1)
        assert document.source == "a.jsonl"


def test_kinds_can_be_mixed(run, write):
    prepared = run(
        write("a.jsonl", jsonl([talk()])),
        write("b.jsonl", jsonl([{"q": "Hello", "a": "Hi there."}]))
        and {
            "path": str(write("b.jsonl", jsonl([{"q": "Hello", "a": "Hi there."}]))),
            "prompt": "q",
            "completion": "a",
        },
        write("c.txt", "some text"),
    )
    one, two, three = (prepared.train.document(i) for i in range(3))
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.scored.tolist() == two.scored.tolist()
    assert three.scored[1:].all()
    assert prepared.report["read"] == {"conversations": 1, "prompts with completions": 1, "texts": 1}
    assert "rendered as user and assistant turns" in " ".join(prepared.report["notes"])
    assert "equal an earlier one" in " ".join(prepared.report["notes"])


def test_the_number_of_workers_changes_nothing(run, write, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.data.parts.ALONE", 0)
    monkeypatch.setattr("ropewalk.data.encode.BATCH_ROWS", 7)
    mixed = [
        item
        for pair in zip(rows(60), [talk(f"q{i}", f"a{i}") for i in range(60)], strict=True)
        for item in pair
    ]
    texts, talks = write("t.jsonl", jsonl(mixed[::2])), write("m.jsonl", jsonl(mixed[1::2]))
    made = []
    for workers in (1, 2, 5):
        prepared = run(texts, talks, workers=workers, overwrite=True, validation_fraction=0.2)
        files = sorted(p for p in prepared.directory.rglob("*") if p.is_file())
        made.append((prepared.directory, {str(p): p.read_bytes() for p in files}))
    assert made[0] == made[1] == made[2]


def test_equal_documents_go_to_the_same_side_whatever_else_there_is(run, write):
    items = rows(200)
    prepared = run(write("a.jsonl", jsonl([*items, *items])), validation_fraction=0.25)
    train, held = ids_of(prepared.train), ids_of(prepared.validation)
    assert len(train) + len(held) == 400
    assert 60 <= len(held) <= 140
    numbers = [int(name.split(":")[1]) for name in held]
    assert sorted((n - 1) % 200 for n in numbers[: len(numbers) // 2]) == sorted(
        (n - 1) % 200 for n in numbers[len(numbers) // 2 :]
    )
    fewer = run(write("b.jsonl", jsonl(items[:50])), validation_fraction=0.25)
    assert {n.split(":")[1] for n in ids_of(fewer.validation)} == {str(n) for n in numbers if n <= 50}
    other = run(write("a.jsonl", jsonl([*items, *items])), validation_fraction=0.25, seed=1)
    assert ids_of(other.validation) != held


def test_validation_that_is_named_is_used_and_compared(run, write):
    prepared = run(
        write("a.jsonl", jsonl(rows(10))),
        validation=[write("v.jsonl", jsonl(rows(4, start=8)))],
        validation_fraction=0.0,
    )
    assert len(prepared.train) == 10
    assert ids_of(prepared.validation) == [f"v.jsonl:{i}" for i in range(1, 5)]
    assert "2 of 4 validation rows are also training rows" in prepared.report["notes"]


def test_no_training_data_is_an_error_that_says_why(run, write):
    with pytest.raises(UserError, match=r"no documents are left.*3 held out by data\.validation_fraction=1"):
        run(write("a.jsonl", jsonl(rows(3))), validation_fraction=1.0)
    with pytest.raises(UserError, match=r"no documents are left.*2 left out: too long"):
        run(write("b.jsonl", jsonl([{"text": "walk " * 99}] * 2)), too_long="drop")
    with pytest.raises(UserError, match=r"c\.jsonl: no documents in it \(data source c\.jsonl\)"):
        run(write("c.jsonl", "\n\n"))
    with pytest.raises(UserError, match=r"no documents are left.*1 left out: empty"):
        run(write("d.txt", "\n"))
    with pytest.raises(UserError, match="names no source"):
        run()


def test_too_few_for_validation_is_said(run, write):
    prepared = run(write("a.jsonl", jsonl(rows(1))), validation_fraction=0.001)
    assert prepared.validation is None
    assert "of so few documents is none" in " ".join(prepared.report["notes"])


# Rows that cannot be used


BAD = [
    ('{"text": ', r"a\.jsonl:3: not valid JSON"),
    (json.dumps({"messages": []}), r"a\.jsonl:3: messages is empty"),
    (json.dumps(talk()["messages"][0]), r"a\.jsonl:3: messages is missing"),
    (
        json.dumps({"messages": talk()["messages"][:1]}),
        r"a\.jsonl:3: no token is scored.*no message of the assistant",
    ),
    (
        json.dumps({"messages": talk()["messages"][::-1]}),
        r"a\.jsonl:3: the conversation begins with the assistant",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_an_error_unless_the_recipe_lets_it_pass(line, message, run, write):
    path = write("a.jsonl", jsonl([talk(), talk("b")]) + f"\n{line}\n" + jsonl([talk("c")]))
    with pytest.raises(UserError, match=message + r".*; set data\.max_bad_rows to skip such rows"):
        run(path)
    prepared = run(path, max_bad_rows=1)
    assert ids_of(prepared.train) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert prepared.report["skipped"]["count"] == 1
    (skipped,) = prepared.report["skipped"]["rows"]
    assert re.search(message, skipped)
    assert skipped in (prepared.directory / "report.md").read_text()


def test_more_bad_rows_than_allowed_are_an_error(run, write):
    path = write("a.jsonl", jsonl([talk()]) + "\n{\n{\n{")
    with pytest.raises(UserError, match=r"a\.jsonl:4: not valid JSON.*data\.max_bad_rows is 2"):
        run(path, max_bad_rows=2)
    assert made(path.parent / "out") == [], "nothing is half made"


def test_a_template_that_raises_names_the_row_and_its_message(run, write):
    path = write(
        "a.jsonl", jsonl([talk(), {"messages": [{"role": "system", "content": "s"}, *talk()["messages"]]}])
    )
    with pytest.raises(UserError, match=r"a\.jsonl:2: the chat template refuses.*System role not supported"):
        run(path, style="gemma")


def test_conversations_need_a_template_and_text_no_assistant(run, write):
    with pytest.raises(UserError, match=r"a\.jsonl:1: is a conversation.*data\.chat_template"):
        run(write("a.jsonl", jsonl([talk()])), style="none", max_bad_rows=5)
    with pytest.raises(
        UserError, match=r"b\.txt: is plain text, in which data\.score=assistant scores nothing"
    ):
        run(write("b.txt", "hello"), score="assistant")


# Rows that are too long


LONG = talk("walk", "rope " * 60)


def test_a_conversation_that_is_too_long_is_an_error_that_says_what_to_set(run, write, tokenizers):
    count = len(tokenizers["chatml"].apply_chat_template(LONG["messages"], return_dict=False))
    path = write("a.jsonl", jsonl([talk(), LONG]))
    message = rf"a\.jsonl:2: {count} tokens, and rows are 64 long; set data\.sequence_length={count} or more"
    for policy in ("auto", "error"):
        with pytest.raises(UserError, match=message):
            run(path, too_long=policy, max_bad_rows=9)
    assert len(run(path, sequence_length=count).train) == 2


def test_too_long_rows_are_truncated_dropped_or_split_and_counted(run, write, tokenizers):
    whole = tokenizers["chatml"].apply_chat_template(LONG["messages"], return_dict=False)
    path = write("a.jsonl", jsonl([talk(), LONG]))
    cut = run(path, too_long="truncate")
    assert cut.train.document(1).tokens.tolist() == whole[:64]
    assert cut.report["truncated_tokens"] == len(whole) - 64
    assert cut.report["changed"] == {"truncated": {"count": 1, "rows": ["a.jsonl:2"]}}
    dropped = run(path, too_long="drop")
    assert ids_of(dropped.train) == ["a.jsonl:1"]
    assert dropped.report["changed"] == {"left out: too long": {"count": 1, "rows": ["a.jsonl:2"]}}
    split = run(path, too_long="split")
    assert ids_of(split.train) == ["a.jsonl:1", *(f"a.jsonl:2#{i}" for i in range(len(split.train) - 1))]
    assert [t for i in range(1, len(split.train)) for t in split.train.document(i).tokens.tolist()] == whole


def test_truncation_that_leaves_nothing_scored_is_an_error(run, write):
    path = write("a.jsonl", jsonl([talk(), talk("walk " * 80)]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: none of its first 64 tokens is scored; raise data"):
        run(path, too_long="truncate")
    assert ids_of(run(path, too_long="truncate", max_bad_rows=1).train) == ["a.jsonl:1"]
    split = run(path, too_long="split")
    pieces = 1 + int(ids_of(split.train)[-1].rpartition("#")[2])
    assert ids_of(split.train)[0] == "a.jsonl:1"
    assert split.train.document(-1).scored.any(), "the answer is in the last piece"
    left_out = split.report["changed"]["left out: a piece without scored tokens"]
    assert left_out["count"] == pieces - (len(split.train) - 1) > 0
    assert left_out["rows"][0] == "a.jsonl:2 (piece 0)"


def test_documents_laid_end_to_end_are_kept_whole(write, tmp_path, tiny_llama_dir):
    """With packing concat nothing is too long, conversations neither; the report counts its rows."""
    talks, text = write("a.jsonl", jsonl([talk(), LONG])), write("b.txt", " ".join(WORDS * 30))
    recipe = {
        "name": "x",
        "model": {"source": str(tiny_llama_dir)},
        "data": {
            "train": [{"path": str(talks), "weight": 1.0}, {"path": str(text), "weight": 1.0}],
            "validation_fraction": 0,
            "sequence_length": 64,
            "packing": "concat",
            "directory": str(tmp_path / "out"),
        },
        "train": {"steps": 1},
    }
    prepared = prepare(recipe)
    assert ids_of(prepared.train) == ["a.jsonl:1", "a.jsonl:2", "b.txt"]
    assert prepared.train.lengths[1:].min() > 64
    assert prepared.report["train"]["rows"] == {"concat": -(-prepared.train.tokens // 64)}
    assert "| documents end to end (filled) |" in (prepared.directory / "report.md").read_text()
    recipe["data"]["train"][0]["weight"] = 2.0
    assert prepare(recipe).directory == prepared.directory, "weights are a matter of training"


def test_long_text_is_split_by_default(run, write, tokenizers):
    text = " ".join(WORDS * 30)
    prepared = run(write("a.txt", text))
    pieces = [prepared.train.document(i).tokens.tolist() for i in range(len(prepared.train))]
    assert list(chain(*pieces)) == [*tokenizers["chatml"](text)["input_ids"], 2]
    assert all(len(piece) == 64 for piece in pieces[:-1])
    assert prepared.report["changed"]["split"]["count"] == 1


# The folder


def test_it_is_made_once_and_found_again(run, write, tmp_path, monkeypatch):
    path = write("a.jsonl", jsonl(rows(30)))
    first = run(path)
    assert first.directory.name == f"a-{first.fingerprint[:12]}"
    monkeypatch.setattr("ropewalk.data.entry.Build", None)  # would fail if it were called
    again = run(path, workers=3)
    assert again.directory == first.directory
    assert again.report == first.report
    moved = write("elsewhere/a.jsonl", jsonl(rows(30)))
    assert run(moved).directory == first.directory, "where a file lies makes no difference"
    assert made(tmp_path / "out") == [first.directory.name]


def test_whatever_matters_changes_the_folder(run, write, tokenizers):
    path = write("a.jsonl", jsonl(rows(30)))
    base = run(path).fingerprint
    assert run(path, seed=9).fingerprint == base, "the seed matters for the split only"
    others = [
        run(path, sequence_length=65),
        run(path, too_long="truncate"),
        run(path, append_eos=False),
        run(path, validation_fraction=0.1),
        run(path, validation_fraction=0.1, seed=9),
        run(path, style="zephyr"),
        run(write("b.jsonl", jsonl(rows(30)))),
        run(write("a.jsonl", jsonl(rows(31)))),
    ]
    prints = {prepared.fingerprint for prepared in others}
    assert len(prints) == len(others)
    assert base not in prints


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train" / "tokens-00000.bin").write_bytes(b""),
        lambda folder: (folder / "train" / "MANIFEST.json").unlink(),
        lambda folder: (folder / "prepared.json").write_text("{"),
        lambda folder: (folder / "prepared.json").write_text("[]"),
        lambda folder: flip(folder / "train" / "tokens-00000.bin"),
        lambda folder: flip(folder / "train" / "documents.parquet"),
    ],
)
def test_a_damaged_folder_is_made_anew_and_that_is_said(damage, run, write, caplog):
    path = write("a.jsonl", jsonl(rows(30)))
    first = run(path)
    whole = first.train.fingerprint
    damage(first.directory)
    with caplog.at_level(logging.WARNING):
        again = run(path)
    assert "is damaged, and made anew" in caplog.text
    assert again.directory == first.directory
    again.train.verify()
    assert again.train.fingerprint == whole


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_file_that_changes_while_it_is_read_is_noticed(run, write, monkeypatch):
    path = write("a.jsonl", jsonl(rows(30)))
    from ropewalk.data import documents

    read = documents.read_unit

    def read_and_change(*arguments):
        yield from read(*arguments)
        path.write_text(jsonl(rows(31)))

    monkeypatch.setattr(documents, "read_unit", read_and_change)
    with pytest.raises(RopewalkError, match=r"a\.jsonl: changed while it was read"):
        run(path)
    assert made(path.parent / "out") == [], "nothing is left of it"


def test_sources_of_one_name_are_told_apart(run, write):
    prepared = run(write("x/a.jsonl", jsonl(rows(2))), write("y/a.jsonl", jsonl(rows(2, start=5))))
    assert ids_of(prepared.train) == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl (2)/a.jsonl:1",
        "a.jsonl (2)/a.jsonl:2",
    ]
    assert set(prepared.report["train"]["sources"]) == {"a.jsonl", "a.jsonl (2)"}


def test_the_report_counts_and_shows(run, write):
    items = [talk(f"question {i}", f"answer {i}") for i in range(40)]
    prepared = run(
        write("a.jsonl", jsonl(items)), write("folder/b.txt", "text") and write("folder/c.png", b"\0").parent
    )
    report, train = prepared.report, prepared.train
    assert report["train"]["documents"] == len(train) == 41
    assert report["train"]["tokens"] == train.tokens == int(train.lengths.sum())
    assert report["train"]["scored"] == train.scored
    assert report["train"]["lengths"]["max"] == train.lengths.max()
    assert sum(bin["documents"] for bin in report["train"]["histogram"]) == 41
    assert {name: counts["documents"] for name, counts in report["train"]["sources"].items()} == {
        "a.jsonl": 40,
        "folder": 1,
    }
    assert (
        0
        < report["train"]["packing_efficiency"]["none"]
        < report["train"]["packing_efficiency"]["best_fit"]
        <= 1
    )
    assert "folder: 1 files of other kinds were left alone" in report["notes"]
    text = (prepared.directory / "report.md").read_text()
    assert text.count("⟦") >= 5
    assert re.search(r"<\|im_start\|>assistant\n⟦answer \d+<\|im_end\|>⟧\n", text)
    assert json.loads((prepared.directory / "prepared.json").read_text())["report"] == report


def test_progress_is_said(run, write):
    said = []
    texts = [jsonl([{"text": f"{i} {k} " + "x " * 14_000} for i in range(40)]) for k in range(5)]
    run(*(write(f"{k}.jsonl", text) for k, text in enumerate(texts)), progress=lambda *a: said.append(a))
    for stage in ("read, MB", "tokenize, MB"):
        done = [at for what, at, of in said if what == stage]
        assert len(done) == 5
        assert done == sorted(done)
        assert all(of == done[-1] == sum(map(len, texts)) >> 20 for what, _, of in said if what == stage)


# The entry


def recipe(path, tokenizer, **data):
    return {
        "name": "t",
        "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)},
        "data": {
            "train": [{"path": str(path)}],
            "sequence_length": 64,
            "directory": str(path.parent / "out"),
            **data,
        },
        "train": {"steps": 1},
    }


def test_a_long_name_of_a_source_makes_a_folder_all_the_same(run, write):
    path = write("a.jsonl", jsonl(rows(3)))
    folder = run({"path": str(path), "name": "x" * 300}).directory
    assert folder.name.startswith("x" * 80 + "-")


def test_names_of_sources_are_different_whatever_they_are_called():
    names = [
        source.name for source in name_sources([{"path": "x"}, {"path": "y", "name": "x (3)"}, {"path": "x"}])
    ]
    assert names == ["x", "x (3)", "x (4)"]


def test_a_mistake_in_a_rule_is_said_before_anything_is_read(tokenizers, write, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.data.entry.survey", None)
    sources = name_sources([{"path": str(write("a.jsonl", jsonl(rows(3))))}])
    plan = Plan(rules=(Rule("mine", "wrds > 3", "", ""),))
    with pytest.raises(UserError, match="unknown attribute wrds"):
        prepare_sources(sources, [], tokenizers["chatml"], Options(64), tmp_path / "out", plan=plan)


def test_plain_files_need_nothing_that_is_an_extra(run, write, monkeypatch):
    for cached in (parsed, columns_of):
        cached.cache_clear()
    for module in ("duckdb", "zstandard", "trafilatura", "pypdf", "warcio", "ftfy"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(run(write("a.jsonl", jsonl(rows(3)))).train) == 3


def test_a_folder_without_a_name_of_its_own_is_called_data(run, write, tmp_path, monkeypatch):
    write("here/a.txt", "some text")
    monkeypatch.chdir(tmp_path / "here")
    assert ids_of(run(".").train) == ["data/a.txt"]


def test_prepared_data_whose_ledger_is_gone_is_made_anew(run, write):
    path = write("a.jsonl", jsonl(rows(3)))
    ledger = run(path).directory / "documents.parquet"
    whole = ledger.read_bytes()
    for damage in (ledger.unlink, lambda: ledger.write_bytes(whole[:-50])):
        damage()
        run(path)
        assert ledger.read_bytes() == whole


def test_a_row_that_is_found_bad_later_is_named_by_its_path_whatever_the_file_is_called(run, write):
    path = write("on!off/we!rd.jsonl", jsonl([*rows(1), talk("a", "b " * 200)]))
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ")):
        run(path)


def test_prepare_takes_a_recipe_with_its_template(write, tiny_tokenizer_dir):
    path = write("a.jsonl", jsonl([talk(f"q{i}") for i in range(50)]))
    prepared = prepare(recipe(path, tiny_tokenizer_dir, validation_fraction=0.2))
    assert prepared.directory.parent == path.parent / "out"
    assert len(prepared.train) + len(prepared.validation) == 50
    template = write(
        "t.jinja",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    other = prepare(recipe(path, tiny_tokenizer_dir, chat_template=str(template)))
    assert "assistant: ⟦Hi there.<|im_end|>⟧" in other.report["samples"][0]["text"]
    with pytest.raises(UserError, match=r"data\.chat_template: .*gone"):
        prepare(recipe(path, tiny_tokenizer_dir, chat_template="gone"))


def test_a_resolved_recipe_gives_the_same_folder(write, tiny_tokenizer_dir):
    from ropewalk.recipe import load_recipe, resolve

    path = write("a.jsonl", jsonl(rows(10)))
    plain = load_recipe(recipe(path, tiny_tokenizer_dir))
    assert prepare(plain).directory == prepare(resolve(plain).recipe).directory


@pytest.mark.slow
def test_real_data_is_prepared_without_loss(run, shared):
    """GSM8K as pairs; the Rust book as Markdown in JSONL, split into rows."""
    pairs = run(
        {"path": str(shared / "data/gsm8k_test.jsonl"), "prompt": "question", "completion": "answer"},
        sequence_length=2048,
    )
    assert len(pairs.train) == 1319
    book = run(shared / "data/rust_book.jsonl", sequence_length=256, style="none")
    assert book.report["train"]["packing_efficiency"]["best_fit"] > 0.98

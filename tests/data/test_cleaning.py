"""From documents to verdicts: what is kept and what is edited, whatever processes and restarts there are."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from ropewalk.data import encode, parts
from ropewalk.data.catalog import plan_of
from ropewalk.data.edits import Edit, edited
from ropewalk.data.encode import Options
from ropewalk.data.entry import name_sources, prepare_sources
from ropewalk.data.records import Record
from ropewalk.errors import RopewalkError, UserError
from ropewalk.recipe.schema import Clean

STOP = "the of and to a in that have with be".split()
WORDS = """rope walk loose fibre strand long straight building hemp work men twist hook wheel tar sail ship
harbour wind river stone bridge market cloth linen spindle thread weaver miller baker smith iron
copper timber oak willow morning evening winter summer garden orchard cellar lantern candle letter
paper printer ladder window chimney kitchen kettle basket barrel wagon horse meadow valley island
mountain forest village captain sailor merchant teacher doctor student answer question number
measure weight length colour silver golden narrow heavy quiet gentle ancient modern simple careful
patient honest early distant northern southern carry gather follow listen remember
""".split()


def prose(i, sentences=12):
    """English in the eyes of every rule; two documents have hardly a run of words in common."""
    rng = random.Random(i)

    def sentence():
        pairs = (f"{rng.choice(STOP)} {rng.choice(WORDS)}" for _ in range(rng.randint(5, 9)))
        return " ".join(pairs).capitalize() + "."

    lines = [" ".join(sentence() for _ in range(3)) for _ in range(-(-sentences // 3))]
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def in_processes(monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(parts, "ALONE", 0)


@pytest.fixture
def run(tokenizers, tmp_path):
    """run(rows, keep=..., rules=..., ...) prepares rows below tmp_path/out."""

    def run(
        rows, *, name="a.jsonl", workers=1, on=None, directory="out", options=(), validation=None, **clean
    ):
        path = tmp_path / name
        path.write_text(
            "\n".join(json.dumps(row if isinstance(row, dict) else {"text": row}) for row in rows)
        )
        held = []
        if validation is not None:
            held = [tmp_path / "held.jsonl"]
            held[0].write_text("\n".join(json.dumps({"text": text}) for text in validation))
        return prepare_sources(
            name_sources([{"path": str(path)}]),
            name_sources([{"path": str(p)} for p in held]),
            tokenizers["chatml"],
            Options(**{"sequence_length": 4096, **dict(options)}),
            tmp_path / directory,
            plan=plan_of(Clean(**clean).model_dump()),
            workers=workers,
            on=on,
        )

    return run


def ledger(prepared):
    return pq.read_table(prepared.directory / "documents.parquet").to_pylist()


def texts(prepared, tokenizers):
    train = prepared.train
    return [tokenizers["chatml"].decode(train.document(i).tokens[:-1].tolist()) for i in range(len(train))]


def test_a_rule_drops_what_it_says_and_the_ledger_says_why(run):
    rows = [prose(i) for i in range(6)] + ["too short", "also too short, by far"]
    prepared = run(rows, keep={"long": "words >= 20", "few_digits": "characters < 100000"})
    verdicts = [row["verdict"] for row in ledger(prepared)]
    assert verdicts == [None] * 6 + ["long"] * 2
    assert [row["split"] for row in ledger(prepared)] == ["train"] * 6 + [None] * 2
    assert len(prepared.train) == 6
    cleaning = prepared.report["cleaning"]
    assert (cleaning["documents"], cleaning["kept"]) == (8, 6)
    assert [(r["rule"], r["dropped"], r["failed_alone"]) for r in cleaning["rules"]] == [
        ("long", 2, 2),
        ("few_digits", 0, 0),
    ]
    assert "`words >= 20`" in (prepared.directory / "report.md").read_text()


def test_the_first_rule_that_fails_is_the_verdict_and_all_that_fail_are_kept(run):
    prepared = run([prose(1), "x"], keep={"a": "words > 5", "b": "characters > 5", "c": "words > 0"})
    assert ledger(prepared)[1]["verdict"] == "a"
    assert ledger(prepared)[1]["failed"] == ["a", "b"]


def test_what_is_unknown_drops_nothing(run):
    prepared = run([prose(1), prose(2)], keep={"lawful": "license <> 'GPL-3.0-only'"})
    assert len(prepared.train) == 2


def test_a_preset_is_changed_and_left_out_by_name(run):
    short = " ".join(prose(3).split()[:30])
    assert len(run([prose(1), short], rules=["gopher"]).train) == 1
    assert len(run([prose(1), short], rules=["gopher"], keep={"gopher_words": "words > 10"}).train) == 2
    assert len(run([prose(1), short], rules=["gopher"], keep={"gopher_words": None}).train) == 2


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ({"keep": {"a": "wrds > 5"}}, r"wrds.*did you mean words\?"),
        ({"keep": {"a": "words >"}}, r"words >.*[Ss]yntax"),
        ({"keep": {"a": "words > (select 1)"}}, "subquery is not allowed"),
        (
            {"keep": {"gopher_word": None}, "rules": ["gopher"]},
            r"data\.clean\.keep\.gopher_word: .*gopher_words",
        ),
        ({"keep": {"a": "language > 5"}}, r"data\.clean\.keep\.a: "),
        ({"against": ["gone.jsonl"]}, r"gone\.jsonl: no such file"),
        ({"score": "words / 0"}, r"data\.clean\.score"),
        (
            {"duplicates": ["near"], "prefer": "near_duplicates"},
            r"data\.clean\.prefer: near_duplicates is known only when documents have been compared",
        ),
    ],
)
def test_a_mistake_is_one_message_that_names_it(run, clean, message):
    with pytest.raises(UserError, match=message):
        run([prose(1), prose(2)], **clean)


def test_duplicates_are_left_out_and_point_to_what_is_kept(run):
    base = prose(1, 30)
    near = base.replace(" of ", " off ", 1)
    prepared = run([base, prose(2), base, near], duplicates=["exact", "near"])
    assert [(row["verdict"], row["duplicate_of"]) for row in ledger(prepared)] == [
        (None, -1),
        (None, -1),
        ("exact_duplicate", 0),
        ("near_duplicate", 0),
    ]
    longest = base + " More of it."
    preferred = run([base, prose(2), longest, near], duplicates=["near"], prefer="characters")
    assert [row["duplicate_of"] for row in ledger(preferred)] == [2, -1, -1, 2]


def test_a_document_that_a_rule_drops_takes_no_other_with_it(run):
    """Its equal, which the rule keeps, stays: duplicates are looked for among what is left."""
    base = prose(1, 20)
    prepared = run([base, {"text": base}], duplicates=["exact"], keep={"not_first": "id <> 'a.jsonl:1'"})
    assert [row["verdict"] for row in ledger(prepared)] == ["not_first", None]


def test_training_documents_that_are_in_the_validation_are_left_out(run):
    prepared = run(
        [prose(1, 20), prose(2, 20)],
        validation=[prose(2, 20), "short"],
        duplicates=["exact"],
        keep={"long": "words > 20"},
    )
    assert [row["verdict"] for row in ledger(prepared)] == [None, "exact_duplicate", None, None]
    assert len(prepared.validation) == 2


def test_repeated_lines_are_cut_but_for_the_first(run, tokenizers):
    line = "Share this page with your friends and subscribe to our newsletter for more!"
    rows = [f"{prose(i)}\n{line}\nThe end of number {i} is here." for i in range(3)]
    found = texts(run(rows, duplicates=["lines"]), tokenizers)
    assert [line in text for text in found] == [True, False, False]
    assert all(f"The end of number {i} is here." in text for i, text in enumerate(found))


def test_personal_data_is_masked_by_its_kind(run, tokenizers):
    rows = [f"{prose(1)} Write to jane.doe@corp.com or to nobody.", prose(2)]
    found = texts(run(rows, pii="mask"), tokenizers)
    assert "jane" not in found[0]
    assert "Write to <email> or to nobody." in found[0]
    assert [row["verdict"] for row in ledger(run(rows, pii="drop"))] == ["pii", None]


def test_personal_data_is_masked_in_conversations(run, tokenizers):
    talk = {
        "messages": [
            {"role": "user", "content": "I am jane.doe@corp.com"},
            {"role": "assistant", "content": "Hello jane.doe@corp.com!"},
        ]
    }
    (found,) = texts(run([talk], pii="mask"), tokenizers)
    assert "I am <email>" in found
    assert "Hello <email>!" in found


def talk(*contents, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **more}


def left_out(prepared):
    """Reason -> numbers of the lines."""
    changed = prepared.report["changed"].items()
    return {what: [int(row.rsplit(":", 1)[1]) for row in found["rows"]] for what, found in changed}


@pytest.mark.parametrize("form", ["text", "messages", "prompt"])
def test_what_a_cut_leaves_empty_is_left_out_with_the_reason(run, tokenizers, form):
    said = prose(7, 3).replace("\n", " ")
    rows = {
        "text": [f"{said}\n\nThe end.", said],
        "messages": [
            talk("Say something about ropes.", said),
            talk("Say the same again, please.", said, "Thank you.", f"{said}\n\nYou are welcome."),
            talk(said, "That is about ropes."),
        ],
        "prompt": [
            {"prompt": "Say something about ropes.", "completion": said},
            {"prompt": "Say the same again, please.", "completion": said},
            {"prompt": said, "completion": "That is about ropes."},
        ],
    }[form]
    prepared = run(rows, duplicates=["paragraphs"])
    lines = list(range(2, len(rows) + 1))
    assert left_out(prepared) == {"left out: emptied by what data.clean cuts": lines}
    assert [row["pieces"] for row in ledger(prepared)] == [1] + [0] * len(lines)
    (found,) = texts(prepared, tokenizers)
    assert said in found


def test_that_of_which_nothing_is_scored_any_more_is_left_out(run, tmp_path):
    """The recipe asked for it, and it is no fault of the row."""
    path, asked = questions(tmp_path)
    masked = {"against": [str(path)], "contaminated": "mask"}
    rows = [
        talk("Ask me something.", asked),
        talk("Ask me something.", asked, "Something else.", "What is your name?"),
        talk(asked, "I do not know."),
    ]
    why = "left out: all that is scored is masked by data.clean"
    assert left_out(run(rows, **masked)) == {why: [1]}
    pairs = [("Ask me something.", asked), (asked, "I do not know.")]
    found = run([{"prompt": prompt, "completion": answer} for prompt, answer in pairs], **masked)
    assert left_out(found) == {why: [1]}
    with pytest.raises(UserError, match="no message of the assistant"):
        run([{"messages": [{"role": "user", "content": asked}]}], **masked)


def test_the_turn_that_is_masked_is_counted_with_messages_that_only_call_tools():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    said = [{"role": "user", "content": "abc"}, call, {"role": "tool", "content": "de"}]
    record = Record("a", "s", "a:1", messages=(*said, {"role": "assistant", "content": "fgh"}))
    at = record.plain.index("g")
    assert edited(record, [Edit(at, at + 1, "mask", "x")]).unscored == ((3, 4),)


def questions(tmp_path):
    path = tmp_path / "test.jsonl"
    asked = (
        "Natalia sold clips to forty eight of her friends in April, and then she sold half as many "
        "clips in May. "
        "How many clips did Natalia sell altogether in April and May?"
    )
    path.write_text(json.dumps({"question": asked, "answer": "seventy two"}))
    return path, asked


def test_evaluation_items_are_dropped_masked_or_reported(run, tokenizers, tmp_path):
    path, asked = questions(tmp_path)
    rows = [prose(1), f"{prose(2)} {asked} {prose(3)}"]
    dropped = run(rows, against=[str(path)])
    assert [row["verdict"] for row in ledger(dropped)] == [None, "contaminated"]
    masked = run(rows, against=[str(path)], contaminated="mask")
    assert len(masked.train) == 2
    document = masked.train.document(1)
    unscored = tokenizers["chatml"].decode(document.tokens[1:][~document.scored[1:]].tolist())
    assert "Natalia sold clips" in unscored
    assert not any(line in unscored for line in prose(2).splitlines())
    assert masked.train.document(0).scored[1:].all()
    kept = run(rows, against=[str(path)], contaminated="keep")
    assert kept.train.document(1).scored[1:].all()
    account = json.loads((kept.directory / "contamination.json").read_text())
    assert account["sets"]["test.jsonl"]["contaminated"] == ["0"]
    for clean in (dropped, masked):
        account = json.loads((clean.directory / "contamination.json").read_text())
        assert account["sets"]["test.jsonl"]["contaminated"] == [], "it is not trained on"
        assert clean.report["contamination"]["sets"]["test.jsonl"]["contaminated"] == ["0"], "it was found"


def test_a_score_is_kept_with_each_document(run):
    prepared = run([prose(1), prose(2, 3)], score="words")
    scores = prepared.train.scores.tolist()
    assert scores[0] > scores[1] > 0


def test_repair_comes_before_everything(run, tokenizers):
    (found,) = texts(run([f"{prose(1)} caf\u00c3\u00a9"], repair=True), tokenizers)
    assert found.endswith("café")


def content(prepared):
    return {
        path.relative_to(prepared.directory.parent).as_posix(): path.read_bytes()
        for path in sorted(prepared.directory.parent.rglob("*"))
        if path.is_file()
    }


EVERYTHING = {
    "rules": ["gopher", "gopher_repetition", "c4", "fineweb"],
    "keep": {"c4_sentences": None, "fineweb_short": None},
    "duplicates": ["exact", "near", "paragraphs", "lines", "passages"],
    "pii": "mask",
    "score": "words",
}


def many(count=120):
    rows = [prose(i, 4 + i % 9) for i in range(count)]
    return rows + rows[::7] + [row.replace("rope", "cord") for row in rows[::11]] + ["short"] * 3


def test_the_result_is_the_same_in_several_processes_and_on_a_cluster_byte_for_byte(run, monkeypatch):
    monkeypatch.setattr("ropewalk.data.entry.UNIT_BYTES", 20_000)
    one = run(many(), workers=1, directory="one", **EVERYTHING)
    assert len(list((one.directory.parent / "parts").glob("documents-*"))) >= 4
    assert 0 < len(one.train) < len(many())
    for on in (None, "dask"):
        other = run(many(), workers=2, on=on, directory=f"on-{on}", **EVERYTHING)
        assert content(one) == content(other), on


def test_what_is_there_is_not_made_again(run, monkeypatch):
    """A threshold that moves costs neither reading nor measuring; a lost file costs itself."""
    monkeypatch.setattr("ropewalk.data.entry.UNIT_BYTES", 20_000)
    made = []
    original = parts.run
    monkeypatch.setattr(
        parts, "run", lambda task: (made.append(task.path.name.split("-")[0]), original(task))
    )
    first = run(many(), keep={"long": "words > 50"})
    assert {"documents", "quality", "tokens"} <= set(made)
    made.clear()
    run(many(), keep={"long": "words > 60"})
    assert set(made) == {"tokens"}
    made.clear()
    next((first.directory.parent / "parts").glob("quality-*")).unlink()
    run(many(), keep={"long": "words > 70"})
    assert sorted(set(made)) == ["quality", "tokens"]
    assert made.count("quality") == 1


def test_a_killed_preparation_goes_on_and_ends_as_if_it_had_not_been(
    run, tmp_path, monkeypatch, tiny_tokenizer_dir
):
    monkeypatch.setattr("ropewalk.data.entry.UNIT_BYTES", 20_000)
    whole = run(many(), directory="whole", **EVERYTHING)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from ropewalk import files\n"
        "from ropewalk.data import entry, parts\n"
        "files.fsync = lambda path: None\n"
        "entry.UNIT_BYTES = 20_000\n"
        "done, original = [0], parts.run\n"
        "def run(task):\n"
        "    original(task)\n"
        "    done[0] += 1\n"
        "    if done[0] == 9:\n"
        "        os.kill(os.getpid(), 9)\n"
        "parts.run = run\n"
        f"entry.prepare({recipe(tmp_path, 'killed', tiny_tokenizer_dir)!r})\n"
    )
    killed = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    left = list((tmp_path / "killed" / "parts").iterdir())
    assert len(left) > 0
    again = run(many(), directory="killed", **EVERYTHING)
    wanted, found = content(whole), content(again)
    assert {k: v for k, v in found.items() if not k.endswith(".tmp")} == wanted


def test_what_a_killed_preparation_left_is_removed_when_nobody_can_be_writing_it(run, tmp_path):
    parts_folder, yesterday = tmp_path / "out" / "parts", time.time() - 25 * 3600
    old, new = parts_folder / ".tokens-1.parquet.0a.tmp", parts_folder / ".tokens-2.parquet.0b.tmp"
    shards, other = (tmp_path / "out" / f".{name}.tmp" for name in ("a-0123456789ab.0123abcd", "somebody's"))
    for path in (old, new, other, shards / "train" / "tokens-00000.bin"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    for path in (old, other, shards / "train" / "tokens-00000.bin", shards / "train", shards):
        os.utime(path, (yesterday, yesterday))
    run(["a b c"])
    assert [path.exists() for path in (old, new, shards, other)] == [False, True, False, True]


def recipe(folder, directory, tokenizer):
    return {
        "name": "t",
        "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)},
        "data": {
            "train": [{"path": str(folder / "a.jsonl")}],
            "directory": str(folder / directory),
            "sequence_length": 4096,
            "workers": 1,
            "clean": EVERYTHING,
        },
        "train": {"steps": 1},
    }


def test_a_script_without_a_main_guard_can_prepare_in_several_processes(tmp_path, tiny_tokenizer_dir):
    rows = many(40)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    wanted = recipe(tmp_path, "out", tiny_tokenizer_dir)
    wanted["data"] |= {"train": [{"path": str(tmp_path / f"{n}.jsonl")} for n in "ab"], "workers": 2}
    script = tmp_path / "script.py"
    script.write_text(
        f"import ropewalk as rw\nfrom ropewalk.data import entry, parts\n"
        f"entry.UNIT_BYTES, parts.ALONE = 10_000, 0\n"
        f"print('begun')\nprint(rw.prepare({wanted!r}).directory)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1


def test_a_cluster_that_is_not_there_is_one_message(run):
    with pytest.raises(UserError, match=r"--on dask:tcp://127\.0\.0\.1:9: no scheduler answers"):
        run(many(20), on="dask:tcp://127.0.0.1:9")
    with pytest.raises(UserError, match="--on slurm: must be dask or dask:ADDRESS"):
        run(many(20), on="slurm")


def test_a_part_that_is_damaged_is_named(run):
    first = run(many(20), keep={"long": "words > 50"})
    path = next((first.directory.parent / "parts").glob("documents-*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(Exception, match=path.name) as raised:
        run(many(20), keep={"long": "words > 51"})
    assert "prepare again" in str(raised.value)


def test_a_model_measures_perplexity_and_finds_what_means_the_same(run, tiny_llama_dir):
    rows = [prose(1), prose(1) + " x", prose(2)]
    keep = {"likely": "bits_per_byte < 100", "other": "similar_of = -1"}
    prepared = run(rows, model=str(tiny_llama_dir), keep=keep, options={"sequence_length": 64})
    assert [row["verdict"] for row in ledger(prepared)][:2] == [None, "other"]


def test_paraphrases_of_items_are_measured_where_a_rule_asks(run, tmp_path):
    path, asked = questions(tmp_path)
    changed = asked.replace("sold", "gave away").replace("friends", "neighbours").replace("clips", "pins")
    prepared = run([prose(1), changed], against=[str(path)], keep={"own_words": "paraphrase < 0.4"})
    assert [row["verdict"] for row in ledger(prepared)] == [None, "own_words"]


@pytest.mark.parametrize("kind", ["quality", "verdicts", "tokens"])
def test_what_is_damaged_is_never_trained_on(run, kind):
    """A wrong byte in what was measured, decided or tokenized is noticed, or nothing asks for it."""
    first = run(many(20), keep={"long": "words > 50"})
    path = next((first.directory.parent / "parts").glob(f"{kind}-*"))
    whole, wanted, noticed = path.read_bytes(), content(first), 0
    for at in np.linspace(8, len(whole) - 9, 12, dtype=int):
        data = bytearray(whole)
        data[at] ^= 255
        path.write_bytes(data)
        shutil.rmtree(first.directory, ignore_errors=True)
        try:
            run(many(20), keep={"long": "words > 50"})
        except RopewalkError as error:
            noticed += 1
            assert path.name in str(error)  # noqa: PT017
        else:  # a column that nothing asks for
            assert content(first) == {**wanted, f"parts/{path.name}": bytes(data)}
    assert noticed >= 2


def test_nothing_says_where_the_data_lay(run, tmp_path, monkeypatch):
    """From another folder, and by a relative path, the same data is the same, byte for byte, parts too."""
    made = []
    for place in ("here", "there"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / place).mkdir()
        rows = [prose(1), "", {"txt": "bad"}, prose(2)]
        options = {"max_bad_rows": 1, "sequence_length": 64}
        made.append(content(run(rows, name=f"{place}/a.jsonl", directory=f"{place}/out", options=options)))
    assert made[0] == made[1]
    assert not [name for name, data in made[0].items() if str(tmp_path).encode() in data]


def test_a_full_disk_is_one_message_and_what_is_done_is_kept(run, tmp_path, monkeypatch):
    """While tokens are written: documents and attributes stay, nothing half-written does, a rerun goes on."""
    original = encode.EncodeUnit.make

    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(encode.EncodeUnit, "make", full)
    with pytest.raises(RopewalkError, match=r"tokens-.*: the disk is full \([\d,]+ bytes free\)"):
        run(many(20), keep={"long": "words > 50"})
    left = {path.name.split("-")[0] for path in (tmp_path / "out" / "parts").iterdir()}
    assert left == {"documents", "quality", "verdicts"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parts"]
    monkeypatch.setattr(encode.EncodeUnit, "make", original)
    assert len(run(many(20), keep={"long": "words > 50"}).train)

"""The front door: fast, light, one message for a mistake, exit statuses a script can use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ropewalk.cli
from ropewalk.cli import main
from ropewalk.errors import RopewalkError, UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
COMMANDS = [
    ["doctor"],
    ["prepare"],
    ["train"],
    ["resume"],
    ["launch"],
    ["eval"],
    ["generate"],
    ["chat"],
    ["run"],
    ["data", "tokenizer"],
    ["data", "fertility"],
    ["data", "classifier"],
    ["data", "ablate"],
    ["runs", "ls"],
    ["runs", "show"],
    ["runs", "diff"],
    ["recipe", "show"],
    ["recipe", "schema"],
]


def in_process(*words: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that runs the command line and then says which heavy modules it has."""
    code = (
        "import sys\n"
        "from ropewalk.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        ([], 0),
        (["train", "--help"], 0),
        (["recipe", "show", RECIPE], 0),
        (["recipe", "show", RECIPE, "train.stps=3"], 2),
        (["runs", "ls", "nowhere"], 0),
        *[([command, RECIPE, "train.stps=3"], 2) for command in ("prepare", "train", "run", "eval")],
        *[([command, "missing.yaml"], 2) for command in ("prepare", "train", "run", "eval")],
    ],
)
def test_nothing_heavy_is_imported_for_help_a_recipe_or_its_mistakes(words, status):
    done = in_process(*words)
    assert done.returncode == status, done.stderr
    assert "HEAVY []" in done.stderr


def test_help_takes_less_than_half_a_second():
    """In processor time, and the best of three: the promise is about the program, not a busy machine."""
    code = "import sys; from ropewalk.cli import main; sys.exit(main(['--help']))"
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_helps_and_takes_debug_and_json(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--debug" in text
    assert "--json" in text or words == ["recipe", "schema"]  # which prints JSON anyway


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "run", "recipe show"])
def test_commands_on_a_recipe_take_overrides(command, capsys):
    main([*command.split(), "--help"])
    assert "KEY=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "error: No such command 'trian'"),
        (["train"], "error: Missing argument 'RECIPE'"),
        (["train", RECIPE, "--fast"], "error: No such option"),
        (["runs"], "error: Missing command"),
        (["recipe", "show", "no.yaml"], "error: no.yaml: no such file"),
        (["recipe", "show", RECIPE, "train.steps=x"], "error: train.steps: must be a whole number above 0"),
        (["runs", "show", "nowhere"], "error: nowhere: not a run directory"),
        (["resume", "nowhere"], "error: nowhere: not a run directory"),
        (["chat", "model", "--temperature", "-1"], "error: Invalid value for '--temperature'"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("where: what to do"), 2, "error: where: what to do\n"),
        (RopewalkError("the disk is full"), 1, "error: the disk is full\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (
            ValueError("surprise"),
            1,
            "error: ValueError: surprise (unexpected; --debug shows the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_commands_end(error, status, said, capsys, monkeypatch):
    monkeypatch.setattr("ropewalk.recipe.json_schema", lambda: (_ for _ in ()).throw(error))
    assert main(["recipe", "schema"]) == status
    assert capsys.readouterr().err == said


def test_debug_shows_the_traceback(monkeypatch):
    def fail() -> None:
        raise UserError("no")

    monkeypatch.setattr("ropewalk.recipe.json_schema", fail)
    with pytest.raises(UserError):
        main(["recipe", "schema", "--debug"])


def test_the_installed_program_is_this_function():
    from importlib.metadata import entry_points

    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "ropewalk"]
    assert script.load() is ropewalk.cli.main


def test_recipe_show_says_value_place_and_reason(capsys):
    assert main(["recipe", "show", RECIPE, "train.batch_size=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split(":")[0].strip(): line for line in lines}
    assert shown["name"].split("# ")[1].startswith(f"{RECIPE}:")
    assert shown["batch_size"].endswith("# override train.batch_size=6") or any(
        line.strip().startswith("batch_size: 6 ") and "override train.batch_size=6" in line for line in lines
    )
    assert shown["clip"].endswith("# default")
    assert "# derived: 2 x adapt.rank" in shown["alpha"]


def test_recipe_show_json(capsys):
    assert main(["recipe", "show", RECIPE, "--json", "train.steps=6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["train"]["steps"] == 6
    assert found["origins"]["train.steps"] == {
        "kind": "override",
        "where": "override train.steps=6",
        "why": "",
    }
    assert found["origins"]["train.threads"]["kind"] == "derived"


def test_recipe_schema_to_a_file(tmp_path, capsys):
    assert main(["recipe", "schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["title"] == "Ropewalk recipe"


def test_runs_of_an_empty_folder(tmp_path, capsys):
    assert main(["runs", "ls", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_the_package_exports_its_commands_lazily():
    code = (
        "import sys, ropewalk as rw\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert callable(rw.load_recipe) and 'torch' not in sys.modules\n"
        "import ropewalk.train, ropewalk.evaluate, ropewalk.doctor, ropewalk.launch\n"
        "names = 'prepare train resume launch evaluate generate chat doctor run'\n"
        "names += ' load_model load_tokenizer save_model'\n"
        "assert all(callable(getattr(rw, name)) for name in names.split())\n"
        "assert set(names.split()) <= set(dir(rw)) and rw.__version__\n"
        "from ropewalk.train import train\n"
        "try: rw.nonsense\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["train", "evaluate", "doctor", "launch"])
def test_a_module_named_like_its_command_can_be_called(name):
    """`import ropewalk.train` binds the module over any function of that name in the package."""
    import importlib

    import ropewalk

    module = importlib.import_module(f"ropewalk.{name}")
    assert getattr(ropewalk, name) is module
    assert callable(module)
    assert module.__call__.__func__.__qualname__ == "_CommandModule.__call__"

"""`ropewalk launch`: mistakes are said before anything starts, and what starts trains, stops and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import ropewalk as rw
from ropewalk.cli import main
from ropewalk.errors import RopewalkError, UserError

ROOT = Path(__file__).resolve().parents[2]
ROPEWALK = Path(sys.executable).with_name("ropewalk")
Recipe = Callable[..., Path]
StandIn = Callable[[str, str], None]


def test_a_dry_run_prints_the_script_and_starts_nothing(
    recipe_file: Recipe, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bash", "sbatch", "kubectl"):
        stand_in(name, f"touch '{tmp_path}/started'")
    recipe = str(recipe_file({"shard": 2}, batch_size=4))
    for place in ("local", "slurm", "kubernetes"):
        assert main(["launch", recipe, "--on", place, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("apiVersion" if place == "kubernetes" else "#!/usr/bin/env bash\n")
        assert "--nproc-per-node=2" in said  # what the recipe asks for
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "runs").exists()
    assert main(["launch", recipe, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"].startswith("#!/usr/bin/env bash\n")


DOCUMENTED = [
    line for line in (ROOT / "docs" / "launching.md").read_text().splitlines() if line.startswith("ropewalk ")
]


@pytest.mark.parametrize("line", DOCUMENTED, ids=range(len(DOCUMENTED)))
def test_what_the_docs_launch_can_be_launched(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(line)[1:], "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stps=3"], "error: train.stps: unknown key; did you mean train.steps?"),
        (["parallel.shard=3"], "error: train.batch_size: 4 rows cannot be shared out among 3 processes"),
        (
            ["parallel.shard=2", "--on", "slurm", "--nodes", "2", "--processes-per-node", "2"],
            "error: parallel: ",
        ),
        (["--nodes", "2"], "error: --nodes: --on local has one; use --on slurm"),
        (["--sbatch=--time=1"], "error: --sbatch: is for --on slurm"),
        (["--on", "slurm", "--sbatch", "time=1"], "error: --sbatch: takes one option of sbatch"),
        (["--on", "slurm", "--sbatch", "--time=1\nrm x"], "error: --sbatch: takes one option of sbatch"),
        (["--image", "x"], "error: --image, --volume: are for --on kubernetes"),
        (["--on", "kubernetes"], "error: --on kubernetes: give --image and --volume"),
        (["--on", "slurm"], "error: --on slurm: sbatch is not on this machine's PATH"),
        (
            ["--on", "kubernetes", "--image", "x", "--volume", "y"],
            "error: --on kubernetes: kubectl is not on",
        ),
    ],
)
def test_a_mistake_is_one_message_before_anything_starts(
    words: list[str],
    said: str,
    recipe_file: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no program is there
    assert main(["launch", str(recipe_file(batch_size=4)), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


def test_sbatch_gets_the_script(
    recipe_file: Recipe, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(
        "sbatch", f"echo \"$#\" > '{tmp_path}/words'; cat > '{tmp_path}/input'; echo Submitted batch job 7"
    )
    words = ["launch", str(recipe_file(batch_size=8)), "train.steps=9", "--on", "slurm", "--nodes", "2"]
    words += ["--processes-per-node", "4", "--cores", "3", "--sbatch=--partition=gpu"]
    assert main([*words, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    assert (tmp_path / "input").read_text() == script
    for line in ("--nodes=2", "--cpus-per-task=12", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus-per-node" not in script  # train.device is cpu
    assert (
        "#SBATCH --gpus-per-node=4\n"
        in rw.launch(
            words[1], ["train.device=auto"], on="slurm", nodes=2, processes_per_node=4, dry_run=True
        ).script
    )  # whatever this machine has


def test_kubectl_gets_the_manifest_and_each_job_has_a_name_of_its_own(
    recipe_file: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    stand_in("kubectl", f"echo \"$*\" > '{tmp_path}/words'; cat > '{tmp_path}/input'; echo created")
    recipe = recipe_file(batch_size=4)
    first, second = (
        rw.launch(recipe, on="kubernetes", nodes=2, processes_per_node=2, image="image", volume="claim")
        for _ in range(2)
    )
    assert first.answer == "created"
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert (tmp_path / "input").read_text() == second.script
    names = []
    for script in (first.script, second.script):
        config, job = yaml.safe_load_all(script)
        assert config["data"]["recipe.yaml"] == recipe.read_text()
        names.append(job["metadata"]["name"])
    assert names[0] != names[1]


def test_what_refuses_a_job_is_quoted(recipe_file: Recipe, stand_in: StandIn) -> None:
    stand_in("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(
        RopewalkError, match="sbatch ended with status 1: sbatch: error: invalid part"
    ) as caught:
        rw.launch(recipe_file(), on="slurm")
    assert not isinstance(caught.value, UserError)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics-train.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def wait_for_step(runs: Path, step: int) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for file in runs.glob("*/metrics-train.jsonl"):
            if len(losses(file.parent)) >= step:
                return file.parent
        time.sleep(0.05)
    raise AssertionError("no such step in two minutes")


@pytest.mark.slow
def test_a_run_on_this_machine_finishes(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file(batch_size=4, steps=3)
    words = [ROPEWALK, "launch", recipe, "evaluate.prompts=[it's $HOME]", "--processes-per-node", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert (run / "report.md").is_file()
    assert len(losses(run)) == 3
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["parallel"]["shard"] == 2
    assert resolved["evaluate"]["prompts"] == ["it's $HOME"]
    outputs = sorted((tmp_path / "runs" / "logs" / "tiny").glob("*/attempt_0/*/stdout.log"))
    assert [path.parent.name for path in outputs] == ["0", "1"]
    assert outputs[0].read_text().strip() == str(run)


@pytest.mark.slow
def test_a_signal_to_launch_ends_all_in_good_order(recipe_file: Recipe, tmp_path: Path) -> None:
    recipe = recipe_file(batch_size=2, steps=100000)
    words = [ROPEWALK, "launch", recipe, "--processes-per-node", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    run = wait_for_step(tmp_path / "runs", 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGTERM)
    assert (run / "checkpoints" / f"step-{len(losses(run)):08d}" / "MANIFEST.json").is_file()
    assert said.endswith(f"the processes' output is in {tmp_path}/runs/logs/tiny\n")
    again = rw.launch(run, ["parallel.shard=1"], processes_per_node=1, dry_run=True).script
    assert f"ropewalk resume {run} parallel.shard=1\n" in again


SRUN = """\
while [[ $1 == -* ]]; do shift; done
for name in 127.0.0.1 localhost; do
  SLURMD_NODENAME=$name "$@" &
  echo $! >> "$STEP"
done
status=0
for process in $(cat "$STEP"); do wait "$process" || status=$?; done
exit "$status"
"""
SCANCEL = """\
for process in $(cat "$STEP"); do
  kill -TERM $(cat /proc/$process/task/$process/children) "$process"
done
"""
SCONTROL = 'if [[ $1 == show ]]; then printf "127.0.0.1\\nlocalhost\\n"; else echo "$@" >> "$QUEUED"; fi'


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_is_queued_again_and_goes_on(
    recipe_file: Recipe, stand_in: StandIn, tmp_path: Path
) -> None:
    """The script itself, with stand-ins for SLURM's programs: two machines that are this one, twice."""
    stand_in("sbatch", f"cat > '{tmp_path}/job.sh'")
    stand_in("srun", SRUN)
    stand_in("scancel", SCANCEL)
    stand_in("scontrol", SCONTROL)
    rw.launch(recipe_file(batch_size=2, steps=60), on="slurm", nodes=2, cores=1)
    number = str(10_000 + os.getpid() % 5_000)  # the port is made from it
    job = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    job |= {"QUEUED": str(tmp_path / "queued")}

    def begin(attempt: int) -> subprocess.Popen[bytes]:
        environment = os.environ | job | {"STEP": str(tmp_path / f"step-{attempt}")}
        with (tmp_path / f"slurm-{attempt}.out").open("wb") as out:
            return subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment, stdout=out, stderr=out)

    first = begin(0)
    run = wait_for_step(tmp_path / "runs", 5)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) != 0
    assert (tmp_path / "queued").read_text() == f"requeue {number}\n"
    done = len(losses(run))
    assert done < 60
    assert (run / "checkpoints" / f"step-{done:08d}" / "MANIFEST.json").is_file()
    assert begin(1).wait(240) == 0, (tmp_path / "slurm-1.out").read_text()
    assert (tmp_path / "queued").read_text().count("requeue") == 1
    assert list((tmp_path / "runs").glob("tiny-*")) == [run]
    assert len(losses(run)) == 60
    assert (run / "report.md").is_file()
    logs = {path.name for path in (tmp_path / "runs" / "logs" / "tiny").iterdir()}
    assert logs == {"127.0.0.1", "localhost"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "sge"}, "--on sge: is none of local, slurm, kubernetes"),
        ({"on": "slurm", "nodes": 0}, "--nodes: 0 is less than 1"),
        ({"on": "slurm", "processes_per_node": -1}, "--processes-per-node: -1 is less than 1"),
        ({"cores": 0}, "--cores: 0 is less than 1"),
    ],
)
def test_the_function_checks_what_the_command_line_does(
    options: dict[str, Any], said: str, recipe_file: Recipe
) -> None:
    with pytest.raises(UserError) as caught:
        rw.launch(recipe_file(), dry_run=True, **options)
    assert str(caught.value) == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_that_ends_a_job_reaches_torchrun_as_one_that_it_passes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Else `launch` dies of it, and leaves the processes to train on without anybody who knows of them."""
    script = "trap 'exit 7' TERM; touch ready; for i in {1..300}; do sleep 0.1; done"
    code = f"from ropewalk.launch.entry import _run; raise SystemExit(_run({script!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 7

"""What is rendered is what is meant: golden files, and every word arrives as it was given."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.launch.kubernetes import job_name, literal, manifest
from ropewalk.launch.scripts import local_script, slurm_script
from ropewalk.launch.start import Start

GOLDEN = Path(__file__).with_name("golden")
PLAIN = Start(
    name="support",
    source="recipes/support.yaml",
    overrides=("train.epochs=2",),
    runs="runs",
    nodes=1,
    processes=2,
    cores=3,
    restarts=3,
    gpu=False,
)
CLUSTER = Start(
    name="Support_8B",
    source="my recipes/it's.yaml",
    overrides=('evaluate.prompts=[Why is the $SKY "blue"?]', "parallel.shard=16"),
    runs="/shared/my runs",
    nodes=2,
    processes=8,
    cores=4,
    restarts=5,
    gpu=True,
)
PROGRAMS = "/shared/env/bin"
TEXT = "# what is trained\nname: Support_8B\ntrain: {epochs: 2}\n"
RENDERED = {
    "local.sh": local_script(PLAIN, PROGRAMS),
    "local-quoted.sh": local_script(CLUSTER, "/a folder/bin"),
    "slurm.sh": slurm_script(CLUSTER, PROGRAMS, ["--partition=gpu", "--time=12:00:00"]),
    "slurm-cpu.sh": slurm_script(PLAIN, PROGRAMS),
    "kubernetes.yaml": manifest(CLUSTER, TEXT, "ropewalk-support-8b-1a2b3c", "registry/ropewalk:1", "work"),
}
SCRIPTS = sorted(name for name in RENDERED if name.endswith(".sh"))


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_text_is_the_golden_file(name: str) -> None:
    """`ROPEWALK_GOLDEN=write pytest tests/launch` writes them anew: read the difference."""
    if os.environ.get("ROPEWALK_GOLDEN") == "write":
        (GOLDEN / name).write_text(RENDERED[name])
    assert RENDERED[name] == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / name)], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(GOLDEN / name)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
NASTY = st.sampled_from(
    ["it's", '"', "$HOME", "`id`", "a b", "\\", "*", "!!", "#x", "\n", "é", "$(id)", "-x", "%j"]
)
ANY_WORD = st.one_of(WORDS, st.lists(NASTY, min_size=1, max_size=4).map("".join))


@settings(max_examples=40, deadline=None)
@given(recipe=ANY_WORD, overrides=st.lists(ANY_WORD, max_size=3), runs=ANY_WORD)
def test_words_arrive_at_torchrun_as_they_were_given(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, overrides: list[str], runs: str
) -> None:
    folder = tmp_path_factory.mktemp("it's a folder")
    record(folder / "torchrun", folder / "kept")
    start = Start("x", recipe, tuple(overrides), runs, 1, 2, 1, 3, False)
    subprocess.run(["bash", "-c", local_script(start, str(folder))], check=True)
    words = read(folder / "kept")
    assert words[words.index("--no-python") :] == ["--no-python", "ropewalk", "train", recipe, *overrides]
    assert f"--log-dir={start.logs}" in words
    assert "--nproc-per-node=2" in words


@settings(max_examples=25, deadline=None)
@given(recipe=ANY_WORD, overrides=st.lists(ANY_WORD, max_size=3), runs=ANY_WORD)
def test_words_arrive_at_torchrun_through_slurm(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, overrides: list[str], runs: str
) -> None:
    """srun starts a shell on each machine, which starts torchrun: two shells see every word."""
    folder = tmp_path_factory.mktemp("slurm")
    record(folder / "torchrun", folder / "kept")
    program(folder / "scontrol", "printf 'node7\\nnode8\\n'")
    program(folder / "srun", 'while [[ $1 == -* ]]; do shift; done\nSLURMD_NODENAME=node8 exec "$@"')
    start = Start("x", recipe, tuple(overrides), runs, 2, 4, 1, 3, False)
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "4"}
    script = slurm_script(start, str(folder))
    subprocess.run(["bash", "-c", script], check=True, env=os.environ | job)
    words = read(folder / "kept")
    assert words[words.index("--no-python") :] == ["--no-python", "ropewalk", "train", recipe, *overrides]
    assert f"--log-dir={start.logs}/node8" in words
    assert "--local-addr=node8" in words
    assert "--rdzv-endpoint=node7:24567" in words  # the first machine; 20000 + 1234567 % 10000
    assert "--rdzv-id=1234567" in words


@given(word=ANY_WORD)
def test_words_arrive_at_torchrun_through_kubernetes(word: str) -> None:
    assert expanded(literal(word), {"HOME": "wrong", "x": "wrong", "id": "wrong"}) == word


@settings(max_examples=60, deadline=None)
@given(word=ANY_WORD, text=WORDS)
def test_the_manifest_is_yaml_that_keeps_every_word(word: str, text: str) -> None:
    # YAML has no other control characters than these, and reads each kind of line end as a line feed
    clean = re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]|[\u2028\u2029]", "", word)
    start = Start("x", "recipe.yaml", (clean,), "runs", 2, 4, 1, 3, True)
    config, job = yaml.safe_load_all(manifest(start, clean + "\nname: x\n", "x", "image", "claim"))
    assert config["data"]["recipe.yaml"] == clean + "\nname: x\n"
    (container,) = pod(job)["containers"]
    assert expanded(container["command"][-1], {}) == clean


def test_the_manifest_is_a_pytorchjob() -> None:
    """The fields of kubeflow.org/v1 that the training operator reads (its pytorch_types.go)."""
    config, job = yaml.safe_load_all(RENDERED["kubernetes.yaml"])
    assert (config["apiVersion"], config["kind"]) == ("v1", "ConfigMap")
    assert config["data"]["recipe.yaml"] == TEXT
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"]["name"] == config["metadata"]["name"]
    spec = job["spec"]
    assert set(spec) == {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    assert spec["nprocPerNode"] == "8"  # text
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == 2
    assert (elastic["maxRestarts"], elastic["rdzvBackend"]) == (5, "c10d")
    assert elastic["rdzvId"] == job["metadata"]["name"]  # by it a run is found again
    (worker,) = spec["pytorchReplicaSpecs"].values()
    assert (worker["replicas"], worker["restartPolicy"]) == (2, "OnFailure")
    (container,) = pod(job)["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"] == {"cpu": "32", "nvidia.com/gpu": "8"}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod(job)["volumes"]}
    recipe = container["command"][container["command"].index("train") + 1]
    assert recipe == f"{mounted['recipe']}/recipe.yaml"
    assert container["workingDir"] == mounted["work"]
    known = {one["name"] for one in container["env"]}
    for word in container["command"]:
        assert set(re.findall(r"(?<!\$)\$\((\w+)\)", word)) <= known


@given(name=st.from_regex(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", fullmatch=True))
def test_a_job_has_a_name_that_kubernetes_takes(name: str) -> None:
    # as part of the name of a pod and of its service: RFC 1035, at most 63 characters
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{job_name(name, '1a2b3c')}-worker-999")
    assert len(job_name(name, "1a2b3c")) <= 52


def pod(job: dict) -> dict:  # type: ignore[type-arg]
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]  # type: ignore[no-any-return]


def expanded(word: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a container's word: `$(NAME)` where it knows NAME, `$$` is `$`."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda m: "$" if m.group() == "$$" else variables.get(m.group(1), m.group()),
        word,
    )


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def record(path: Path, kept: Path) -> None:
    program(path, f'printf "%s\\0" "$@" > "{kept}"')


def read(kept: Path) -> list[str]:
    return kept.read_bytes().decode().split("\0")[:-1]

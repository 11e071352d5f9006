"""The manifest for Kubernetes: a PyTorchJob of Kubeflow's training operator (API kubeflow.org/v1).

Written from https://www.kubeflow.org/docs/components/trainer/legacy-v1/reference/training-operator/.
"""

import re
from typing import Any

import yaml

from ropewalk.launch.start import GRACE, Start

FOLDER = "/workspace"
"""Where the volume is in each pod, and what the recipe's paths are relative to."""
RECIPE = "/etc/ropewalk/recipe.yaml"


def job_name(name: str, suffix: str) -> str:
    """A name that pods, services and jobs may have (RFC 1035), short enough for what the operator adds."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:30].rstrip("-")
    return f"ropewalk-{plain}-{suffix}"


def manifest(start: Start, recipe_text: str, job: str, image: str, volume: str) -> str:
    """A ConfigMap with the recipe, and the job: YAML for `kubectl apply`.

    `job`: its name, new each time: by it the processes find their run when a pod is started again.
    `image`: has Ropewalk. `volume`: a persistent volume claim with the data and the folder of runs, which all
    pods can write to (ReadWriteMany).
    """
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job},
        "data": {RECIPE.rpartition("/")[2]: recipe_text},
    }
    training = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job},
        "spec": {
            "nprocPerNode": str(start.processes),
            # the operator tells torchrun of these by variables: PET_NNODES, PET_RDZV_ENDPOINT, ...
            "elasticPolicy": {
                "minReplicas": start.nodes,
                "maxReplicas": start.nodes,
                "maxRestarts": start.restarts,
                "rdzvBackend": "c10d",
                "rdzvId": job,
            },
            # a pod that is lost takes the others' processes with it, so that each counts
            "runPolicy": {"backoffLimit": start.restarts * start.nodes},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": start.nodes,
                    "restartPolicy": "OnFailure",
                    "template": {"spec": _pod(start, job, image, volume)},
                }
            },
        },
    }
    return yaml.dump_all([recipe, training], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _pod(start: Start, job: str, image: str, volume: str) -> dict[str, Any]:
    fields = {"POD_NAME": "metadata.name", "POD_IP": "status.podIP"}
    resources = {"cpu": str(start.processes * start.cores)}
    if start.gpu:
        resources["nvidia.com/gpu"] = str(start.processes)
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": image,
        "workingDir": FOLDER,
        "command": [
            "torchrun",
            f"--nproc-per-node={start.processes}",
            "--local-addr=$(POD_IP)",
            f"--log-dir={literal(start.logs)}/$(POD_NAME)",
            *map(literal, start.training(RECIPE)),
        ],
        "env": [
            *({"name": name, "value": value} for name, value in start.variables.items()),
            *(
                {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
                for name, path in fields.items()
            ),
        ],
        "resources": {"limits": resources},
        "volumeMounts": [
            {"name": "work", "mountPath": FOLDER},
            {"name": "recipe", "mountPath": RECIPE.rpartition("/")[0]},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": volume}},
            {"name": "recipe", "configMap": {"name": job}},
            # processes of a pod talk through it, and a container's own has 64 MB
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is, so that a person can read the recipe."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def literal(word: str) -> str:
    """Kubernetes replaces `$(NAME)` in a container's words, and reads `$$` as `$`."""
    return word.replace("$", "$$")

"""Accelerators and clusters: what they can do at most, what of that real kernels reach, and how they are
wired."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ropewalk.errors import UserError
from ropewalk.plan.inputs import counted, nearest

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
PRECISIONS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8": "float8",
    "amp_bf16": "bfloat16",
    "amp_fp8": "float8",
}


@dataclass(frozen=True, eq=False)
class Accelerator:
    """One device. Rates in FLOP/s and bytes/s, times in seconds, memory in bytes.

    The shares say what real kernels reach of a peak; with the peaks they are all that the time model knows of
    a device, and no run has any of its own.
    """

    name: str
    peak: Mapping[str, float]
    """dense FLOP/s by the type of the factors"""
    memory: float
    memory_bandwidth: float
    link: float
    """to the others of a node, one way"""
    network: float
    """its share of the node's network, one way"""
    matmul: float
    memory_share: float
    attention: float
    attention_backward: float
    launch: float
    link_share: float
    network_share: float
    per_node: int
    latency: float
    network_latency: float
    host: float
    context: float
    matmul_float8: float | None = None
    own: Mapping[str, float] | None = None
    """shares that this project's blocks reach, where they were measured"""
    update: float | None = None
    """bytes/s of the optimizer's updates, where they were measured"""
    unpack: Mapping[str, float] | None = None
    """numbers/s that are dequantized, by kind, where it was measured"""
    torus: tuple[int, ...] = ()
    per_core: bool = False
    price: float | None = None
    """dollars an hour"""
    source: str = ""
    calibrated: bool = False
    """measured on the machine itself"""

    def peak_of(self, precision: str) -> float:
        """FLOP/s of products. UserError where the device has no such type."""
        name = precision_name(precision)
        if name not in self.peak:
            raise UserError(f"{self.name} does not multiply {name}; it has {', '.join(self.peak)}")
        return self.peak[name]


@dataclass(frozen=True, eq=False)
class Cluster:
    """`devices` of one kind, `per_node` in a node; a network between the nodes."""

    accelerator: Accelerator
    devices: int
    per_node: int
    oversubscription: float = 1.0
    """by how much the upper levels of a fat tree are narrower than the nodes' own connections"""
    topology: str = "rail"
    """rail, fat-tree or torus"""
    torus: tuple[int, ...] = ()
    price: float | None = None
    """dollars an hour and device"""
    host_memory: float | None = None
    """bytes of a node; None: not known"""
    label: str = ""
    sends: bool = False
    """this project's own blocks run there, whose operations the host sends one by one"""

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)

    @property
    def network(self) -> float:
        """A device's share of the network between nodes, bytes/s one way, as large collectives see it."""
        return self.accelerator.network / self.oversubscription

    def __str__(self) -> str:
        return self.label or f"{self.devices}x{self.accelerator.name}"

    def ours(self) -> "Cluster":
        """The same with the rates of this project's own blocks, compiled or not."""
        own: dict[str, Any] = dict(self.accelerator.own or {})
        device = self.accelerator if self.accelerator.calibrated else replace(self.accelerator, **own)
        return replace(self, accelerator=device, sends=True)

    def of(self, devices: int) -> "Cluster":
        """The same kind of cluster of another size."""
        return replace(self, devices=devices, label="")


def precision_name(name: str) -> str:
    """`bf16` -> `bfloat16`, and so on. UserError for what is no type of products."""
    full = PRECISIONS.get(name, name)
    if full not in ("bfloat16", "float16", "float32", "float8", "int8"):
        raise UserError(f"precision {name}: unknown; use one of {', '.join(PRECISIONS)}")
    return full


def number(value: Any, what: str) -> float:
    """A positive number, also with a unit of bytes (`80GiB`). UserError, naming `what`, for anything else."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(" + "|".join(_UNITS) + r")?\s*", value)
        try:
            value = float(match[1]) * _UNITS.get(match[2] or "", 1) if match else None
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{what}: must be a number above 0")
    return float(value)


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("accelerators.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return table


def accelerators() -> list[str]:
    """The names there are."""
    return [name for name in _table() if name != "defaults"]


def accelerator(name: str, **changes: Any) -> Accelerator:
    """By its name or an alias, upper or lower case; `changes` of its fields. UserError with the nearest
    names."""
    names = {}
    for known in accelerators():
        for alias in [known, *_table()[known].get("aliases", [])]:
            names[_plain(alias)] = known
    found = names.get(_plain(name))
    if found is None:
        close = get_close_matches(_plain(name), names, 3, 0.4)
        near = list(dict.fromkeys(names[one] for one in close)) or accelerators()
        raise UserError(f"unknown accelerator {name}; did you mean {' or '.join(near)}?")
    return _accelerator(found, {**_table()["defaults"], **_table()[found], **changes})


def _accelerator(name: str, values: Mapping[str, Any]) -> Accelerator:
    shares = {key: value for key, value in values.items() if key != "aliases"}
    known = {one.name for one in fields(Accelerator)}
    for wrong in sorted(set(shares) - known, key=str):
        raise UserError(f"accelerator {name}: unknown field {wrong}{nearest(wrong, known)}")
    made = {key: _value(f"{name}.{key}", key, value) for key, value in shares.items()}
    return Accelerator(**{**made, "name": name})


def _value(what: str, key: str, value: Any) -> Any:
    """A field of an Accelerator as it was written down. UserError, naming `what`, where it cannot be that."""
    if key in ("name", "source", "per_core", "calibrated") or (value is None and key in _OPTIONAL):
        return value
    if key in ("peak", "own"):
        if not isinstance(value, dict) or not value:
            raise UserError(f"{what}: give a number for each, as in {{bfloat16: 989e12}}; not {value!r}")
        plain = precision_name if key == "peak" else str
        return {plain(one): number(rate, f"{what}.{one}") for one, rate in value.items()}
    if key == "torus":
        return sides(value, what)
    if key == "per_node":
        return counted(value, what)
    found = number(value, what)
    if found > 1 and key in _SHARES:
        raise UserError(f"{what}: is a share of the peak, above 0 and at most 1; not {value!r}")
    return found


_SHARES = "matmul matmul_float8 memory_share attention attention_backward link_share network_share".split()
_OPTIONAL = ("matmul_float8", "own", "update", "price")


def sides(value: Any, what: str) -> tuple[int, ...]:
    """Of a torus. UserError, naming `what`, for anything but a list of whole numbers."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{what}: give the length of each side, as in [4, 4, 4]; not {value!r}")
    return tuple(counted(one, what) for one in value)


def cpu_kind() -> str:
    """The accelerator that this machine's cores are, by their instructions."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "CPU-AVX2"
    if "amx_bf16" in flags:
        return "CPU-AMX"
    return "CPU-AVX512" if "avx512f" in flags else "CPU-AVX2"


def _plain(name: str) -> str:
    """Letters and digits, without what vendors and families put before a device's name."""
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|[^a-z0-9]", "", str(name).lower())


def cluster(on: "str | Path | Cluster", network: str | None = None) -> Cluster:
    """`8xH100`, `4x8xA100-80GB-SXM`, a name alone (one device), or a YAML file.

    network: `8x200Gb/s`, the connections of one node. A file has the fields `accelerator` (a name, or a
    mapping with `name` and whatever is to be different), `nodes`, `per_node`, `network`, `topology` (rail,
    fat-tree, torus), `oversubscription`, `torus` (its dimensions), `price` ($ an hour and device),
    `host_memory`.
    """
    if isinstance(on, Cluster):
        return on
    if not isinstance(on, str | Path) or not str(on).strip():
        raise UserError(f"a cluster is written as 8xH100, or is a file; not {on!r}")
    if Path(on).suffix in (".yaml", ".yml"):
        return _from_file(Path(on), network)
    match = re.fullmatch(r"\s*(?:(-?\d+)\s*[x*]\s*)?(?:(-?\d+)\s*[x*]\s*)?(.+?)\s*", str(on))
    assert match is not None  # .+ matches whatever is there
    counts = [int(count) for count in match.groups()[:2] if count is not None]
    if any(count < 1 for count in counts):
        raise UserError(f"{on}: the number of devices must be above 0")
    device = accelerator(match[3])
    if device.per_core:
        device, counts = of_cores(device, counts[-1] if counts else 1), counts[:-1]
    per_node = counts[1] if len(counts) == 2 else device.per_node
    devices = counts[0] * counts[1] if len(counts) == 2 else (counts[0] if counts else 1)
    return _with_network(Cluster(device, devices, min(per_node, devices), torus=device.torus), network)


def of_cores(device: Accelerator, cores: int) -> Accelerator:
    """`16xCPU-AMX` is one device of sixteen cores: its processes share what they have."""
    return replace(
        device,
        peak={name: rate * cores for name, rate in device.peak.items()},
        memory=device.memory * max(1, cores // 4),
        memory_bandwidth=device.memory_bandwidth * min(cores, 16),
        per_core=False,
    )


def _with_network(made: Cluster, network: str | None) -> Cluster:
    if network is None:
        return made
    match = re.fullmatch(r"\s*(?:([1-9]\d*)\s*[x*]\s*)?([0-9.]+)\s*(G|T)b(?:ps|/s|it/s)?\s*", str(network))
    if match is None:
        raise UserError(f"network {network}: write the connections of one node as 8x200Gb/s")
    rate = int(match[1] or 1) * number(match[2], "network") * (1e9 if match[3] == "G" else 1e12) / 8
    device = replace(made.accelerator, network=rate / min(made.per_node, made.devices))
    return replace(made, accelerator=device)


_FIELDS = "accelerator nodes per_node network topology oversubscription torus price host_memory".split()
"""of a cluster's file"""


def _from_file(path: Path, network: str | None) -> Cluster:
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    kind = said.get("accelerator") if isinstance(said, dict) else None
    changes = dict(kind) if isinstance(kind, dict) else {"name": kind}
    if changes.get("name") is None:
        raise UserError(f"{path}: give at least accelerator, nodes and per_node")
    for wrong in [key for key in said if key not in _FIELDS]:
        raise UserError(f"{path}: unknown field {wrong}{nearest(wrong, _FIELDS)}")
    device = accelerator(str(changes.pop("name")), **{str(key): value for key, value in changes.items()})
    sizes = {
        key: number(said.get(key, 1), f"{path}: {key}") for key in ("nodes", "per_node", "oversubscription")
    }
    if any(sizes[key] % 1 for key in ("nodes", "per_node")):
        raise UserError(f"{path}: nodes and per_node are whole numbers")
    per_node = int(sizes["per_node"]) if "per_node" in said else device.per_node
    topology = str(said.get("topology", "torus" if device.torus else "rail"))
    if topology not in ("rail", "fat-tree", "torus"):
        raise UserError(f"{path}: topology {topology}: one of rail, fat-tree, torus")
    torus = sides(said["torus"], f"{path}: torus") if "torus" in said else device.torus
    if topology == "torus" and not torus:
        raise UserError(f"{path}: a torus needs the length of each side, as in torus: [4, 4, 4]")
    optional: dict[str, Any] = {
        key: number(said[key], f"{path}: {key}")
        for key in ("price", "host_memory")
        if said.get(key) is not None
    }
    made = Cluster(
        device,
        int(sizes["nodes"]) * per_node,
        per_node,
        oversubscription=sizes["oversubscription"],
        topology=topology,
        torus=torus,
        **optional,
    )
    return _with_network(made, str(said["network"]) if "network" in said else network)

"""What a script or manifest is made from, and the torchrun command that all of them hold."""

from dataclasses import dataclass

GRACE = 120
"""Seconds between the notice that a job will be ended and its end: time for a checkpoint."""

VARIABLES = {
    # by torch's default a third of the restarts fail with Gloo
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # torchrun passes a signal on, and kills 30 s later unless told (older ones than torch 2.13 always do)
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE - 10),
}
ON_GPUS = {
    # an operation that fails or takes too long ends its process, so that torchrun starts all again
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # not sooner than the run's own watchdog (parallel.hang_seconds), which says who hangs, and where
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1800",
}


@dataclass(frozen=True)
class Start:
    """A recipe's processes, as plain values: what is rendered is a function of these alone."""

    name: str
    """the recipe's: letters, digits, `.`, `_` and `-`"""
    source: str
    """path of a recipe or, to go on with it, of a run directory, as it was given"""
    overrides: tuple[str, ...]
    runs: str
    """folder of runs; each process's output is kept in RUNS/logs/NAME"""
    nodes: int
    processes: int
    """on each node"""
    cores: int
    """CPU cores of each process"""
    restarts: int
    gpu: bool
    """one for each process"""
    resume: bool = False
    """the source is a run directory"""

    @property
    def logs(self) -> str:
        return f"{self.runs.rstrip('/')}/logs/{self.name}"

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment of torchrun."""
        return {"OMP_NUM_THREADS": str(self.cores)} | VARIABLES | (ON_GPUS if self.gpu else {})

    def training(self, recipe: str | None = None) -> list[str]:
        """The last words of torchrun: what each process runs. `recipe`: where it is there, if not here."""
        what = ["resume", self.source] if self.resume else ["train", recipe or self.source]
        return ["--tee=3", "--no-python", "ropewalk", *what, *self.overrides]

"""Counts and watches the memory of steps in several processes: `python memory_worker.py OUT.json` with
torchrun's variables. Each layout's own count, the peak that was seen, and both for each phase."""

import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ropewalk.layout import Layout
from ropewalk.model import config_from_fields
from ropewalk.parallel import World, shard
from ropewalk.plan.step_memory import step_memory
from ropewalk.plan.trace import Seen, Traced, Tracker, _job, _micro_batches, _step, model_of, watching
from ropewalk.plan.work import Work

CONFIG = config_from_fields(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
)
MIXTURE = replace(
    CONFIG,
    moe_layers=(0, 1, 2, 3),
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    norm_topk_prob=True,
    router_aux_loss_coef=0.01,
)
WORK = Work(CONFIG, sequence_length=512, micro_batch_size=2, device="cpu")
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "stage 3": (Layout(shard=2), {}),
    "stage 3, float32": (Layout(shard=2), {"precision": "float32"}),
    "stage 3, recomputed": (Layout(shard=2), {"checkpointing": "full"}),
    "stage 3, 3 micro-batches": (Layout(shard=2), {"accumulation": 3}),
    "stage 2": (Layout(shard=2, stage=2), {}),
    "stage 1, 2 micro-batches": (Layout(shard=2, stage=1), {"accumulation": 2}),
    "replicas": (Layout(shard=1, replicate=2), {}),
    "LoRA": (Layout(shard=2), {"method": "lora", "checkpointing": "full"}),
    "QLoRA": (Layout(shard=2), {"method": "lora", "quantize": "nf4"}),
    "LoRA on int8": (Layout(shard=2), {"method": "lora", "quantize": "int8"}),
    "tensor": (Layout(shard=1, tensor=2), {}),
    "tensor, recomputed": (Layout(shard=1, tensor=2), {"checkpointing": "full"}),
    "context": (Layout(shard=1, context=2, context_exchange="ring"), {}),
    "mixture": (Layout(shard=2), {"config": MIXTURE}),
    "experts": (Layout(shard=2, expert=2), {"config": MIXTURE, "checkpointing": "full"}),
    "experts and tensor": (Layout(shard=1, tensor=2, expert=2), {"config": MIXTURE}),
    "ulysses": (Layout(shard=1, context=2, context_exchange="ulysses"), {}),
}
GROUND = torch.UntypedStorage.resize_


class Resizing(Tracker):
    """fully_shard makes weights and lets them go by giving their storages a size, and none."""

    def resized(self, storage: Any) -> None:
        self.event += 1
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            if known[1].size == size:
                return
            known[1].died = self.event
        seen = Seen(size, self.event, self.phase, role="gathered weights")

        def gone(_: Any) -> None:
            seen.died = self.event
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone), seen
        self.seen.append(seen)

    def _note(self, tensor: Tensor, fresh: bool) -> list[Seen]:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        # what a collective has made comes as the input of something else
        return super()._note(tensor, fresh or self.event > 0)


def seen(work: Work, world: World) -> Traced:
    """The second step of this process."""
    torch.manual_seed(0)  # which tokens an expert gets is decided by weights
    model = model_of(work)
    shard(model, world)
    job = _job(work, model, world)
    parts = _micro_batches(work)
    with Tracker() as first:
        _step(job, parts, first)
    tracker = Resizing()

    def resize(storage: Any, size: int) -> Any:
        result = GROUND(storage, size)
        tracker.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
    try:
        with tracker, watching(job, parts, tracker):
            _step(job, parts, tracker)
    finally:
        torch.UntypedStorage.resize_ = GROUND  # type: ignore[method-assign]
    return tracker.result()


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, (layout, fields) in CASES.items():
        world = World.join("cpu", layout)
        work = replace(WORK, layout=world.layout, **fields)
        real, counted = seen(work, world), step_memory(work)
        found[name] = [[counted.total_bytes, real.total_bytes]]
        found[name] += [
            [counted.moments[phase], real.peaks[phase]] for phase in ("forward", "loss", "backward")
        ]
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))


main()

"""Attention over divided rows beside the reference: `python attention_worker.py CASES.json`.

Each case is compared in every process; the first writes the largest differences, relative to the reference.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ropewalk.ops import AttentionLayout, attention_reference
from ropewalk.parallel.context import EXCHANGES


def documents(rows: int, length: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Random segments: documents of 1 to `most` tokens, and some padding at the end of some rows."""
    segments = torch.empty(rows, length, dtype=torch.int64)
    for row in segments:
        sizes = torch.randint(1, most + 1, (length,), generator=generator)
        row.copy_(torch.arange(length).repeat_interleave(sizes)[:length])
        padding = int(torch.randint(0, length // 4, (1,), generator=generator))
        row[length - padding * (padding % 2) :] = -1
    return segments


sent = 0


def counted(size: Callable[..., int], *names: str) -> None:
    """Counts the bytes that this process must send for each call of what torch.distributed calls so."""
    name = next(name for name in names if hasattr(dist, name))
    real = getattr(dist, name)

    def call(*arguments: Any, **options: Any) -> Any:
        global sent
        sent += size(*arguments)
        return real(*arguments, **options)

    setattr(dist, name, call)


def count_bytes(degree: int) -> None:
    others = degree - 1
    counted(lambda _, mine: others * mine.nbytes, "all_gather_single", "all_gather_into_tensor")
    scattered = "reduce_scatter_single", "reduce_scatter_tensor"
    counted(lambda _, whole: others * whole.nbytes // degree, *scattered)
    counted(lambda _, mine: others * mine.nbytes // degree, "all_to_all_single")
    counted(lambda op, tensor: tensor.nbytes if op is dist.isend else 0, "P2POp")


def differences(case: dict[str, Any]) -> list[float]:
    """Of the result and the gradients of q, k and v, for this process's tokens; and the bytes sent."""
    global sent
    sent = 0
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = getattr(torch, case["dtype"])
    rows, length = case["rows"], case["length"]
    segments = documents(rows, length, case["longest"], generator)
    sizes = [case["heads"], case["kv_heads"], case["kv_heads"], case["heads"]]
    q, k, v, grad = (torch.randn(rows, length, n, 8, generator=generator, dtype=torch.float64) for n in sizes)
    options = {"window": case["window"], "softcap": case["softcap"], "scale": case["scale"]}
    whole = [t.to(dtype).double().requires_grad_() for t in (q, k, v)]
    wanted = attention_reference(*whole, segments, **options)
    wanted.backward(grad.to(dtype).double())

    exchange = EXCHANGES[case["kind"]](dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    here = exchange.columns(length)
    mine = [t[:, here].detach().to(dtype).requires_grad_() for t in (q, k, v)]
    part = exchange.part()
    found = part.attention(*mine, layout=AttentionLayout.from_segments(segments), **options)
    found.backward(grad[:, here].to(dtype))
    pairs = [(found.detach(), wanted.detach()[:, here])]
    pairs += [(t.grad, w.grad[:, here]) for t, w in zip(mine, whole, strict=True)]
    return [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs] + [sent]


cases = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
dist.init_process_group("gloo")
count_bytes(dist.get_world_size())
results = []
for case in cases:
    worst = torch.tensor(differences(case), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    results.append(worst.tolist())
if os.environ["RANK"] == "0":
    Path(sys.argv[1]).with_suffix(".result").write_text(json.dumps(results))
dist.destroy_process_group()  # its threads must have ended before C++ is taken down

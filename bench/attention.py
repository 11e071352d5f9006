"""Which attention kernel is fastest where: what `ropewalk.ops.attention` picks, and all others.

    python bench/attention.py --device cpu                  # a few minutes on two cores
    python bench/attention.py --device cuda                 # one GPU; compiles FlexAttention for each shape
    python bench/attention.py --device cpu --quick          # does it run at all?

Forward and backward of one layer, causal within documents, bfloat16; the candidates take turns, medians over
the rounds. A candidate that does not take a shape is left out with the reason, and so is one whose result is
not the reference's. "pick" is what Ropewalk does by itself; "best" the fastest of the others.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import as_json, machine, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropewalk.ops import AttentionLayout, attention, attention_reference

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shape:
    """Documents of these lengths in one row, as often as `count` says."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None


MIXED = (118, 87, 203, 140, 66, 95, 171, 122, 400, 77, 150, 113, 99, 207)
"""As long as the quickstart's conversations: 2,048 tokens."""
SHAPES = {
    "cpu": (
        Shape("32 documents of 64", (64,) * 32, 9, 3, 64),
        Shape("14 of 66 to 400", MIXED, 9, 3, 64),
        Shape("4 of 512", (512,) * 4, 9, 3, 64),
        Shape("1 of 2,048", (2048,), 9, 3, 64),
        Shape("1 of 4,096, window 512", (4096,), 9, 3, 64, window=512),
        Shape("1 of 1,024, soft-cap", (1024,), 8, 4, 128, softcap=50.0),
    ),
    "cuda": (
        Shape("14 of 66 to 400, twice", MIXED * 2, 32, 8, 128),
        Shape("8 of 512", (512,) * 8, 32, 8, 128),
        Shape("1 of 4,096", (4096,), 32, 8, 128),
        Shape("1 of 32,768", (32768,), 32, 8, 128),
        Shape("1 of 32,768, window 4,096", (32768,), 32, 8, 128, window=4096),
        Shape("1 of 8,192, soft-cap", (8192,), 8, 4, 256, softcap=50.0),
        Shape("1 of 8,192, soft-cap, window 4,096", (8192,), 8, 4, 256, window=4096, softcap=50.0),
    ),
}
QUICK = (Shape("quick", (70, 30), 4, 2, 16), Shape("quick, soft-cap", (64,), 4, 2, 16, 16, 30.0))
ALL_PAIRS = 8192
"""Longest row of which the plain formula, with a mask of all pairs of tokens, fits."""
Candidate = Callable[[Tensor, Tensor, Tensor, Shape], Tensor]
"""q `[1, S, heads, D]`, k and v `[1, S, kv_heads, D]` -> as q. ValueError where it cannot."""


def pick(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    layout = AttentionLayout.from_segments(segments(shape))
    return attention(q, k, v, layout=layout, window=shape.window, softcap=shape.softcap)


def written_out(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    if q.shape[1] > ALL_PAIRS:
        raise ValueError("holds all pairs of tokens")
    return attention_reference(q, k, v, segments(shape).to(q.device), shape.window, shape.softcap)


def scaled(backend: SDPBackend) -> Candidate:
    """torch's scaled_dot_product_attention on one kernel, document by document."""

    def attend(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        if shape.softcap is not None:
            raise ValueError("knows no soft-cap")
        outputs, start = [], 0
        with sdpa_kernel(backend):
            for length in shape.lengths:
                parts = [t[:, start : start + length].transpose(1, 2) for t in (q, k, v)]
                mask = None
                if shape.window is not None and shape.window < length:
                    mask = _band(length, shape.window, q.device)
                out = F.scaled_dot_product_attention(
                    *parts, attn_mask=mask, is_causal=mask is None, enable_gqa=shape.heads != shape.kv_heads
                )
                outputs.append(out.transpose(1, 2))
                start += length
        return torch.cat(outputs, 1)

    return attend


def in_float32(candidate: Candidate) -> Candidate:
    return lambda q, k, v, shape: candidate(q.float(), k.float(), v.float(), shape).to(q.dtype)


def packed(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """torch's kernel for documents laid end to end."""
    if q.device.type != "cuda" or shape.softcap is not None:
        raise ValueError("CUDA only, without soft-cap")
    from ropewalk.ops.attention_kernels import packed_attention

    packing = AttentionLayout.from_segments(segments(shape)).packing(0, q.device)
    return packed_attention(q[0], k[0], v[0], packing, shape.window, q.shape[-1] ** -0.5, None)[None]


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """torch's FlexAttention, compiled; its mask is made once a shape, as a batch would."""
    if q.device.type != "cuda":
        raise ValueError("has no backward pass on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape not in _masks:
        documents = segments(shape)[0].to(q.device)

        def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (documents[query] == documents[key]) & (query >= key)
            return inside & (query - key < (shape.window or sum(shape.lengths)))

        size = sum(shape.lengths)
        _masks[shape] = (
            create_block_mask(seen, None, None, size, size, device=q.device),
            torch.compile(flex_attention),
        )
    mask, compiled = _masks[shape]
    cap = shape.softcap

    def soft(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    parts = [t.transpose(1, 2) for t in (q, k, v)]
    grouped = shape.heads != shape.kv_heads
    out: Any = compiled(
        *parts, score_mod=soft if cap is not None else None, block_mask=mask, enable_gqa=grouped
    )
    return out.transpose(1, 2)


_masks: dict[Shape, Any] = {}
CANDIDATES: dict[str, Candidate] = {
    "pick": pick,
    "flash": scaled(SDPBackend.FLASH_ATTENTION),
    "flash in float32": in_float32(scaled(SDPBackend.FLASH_ATTENTION)),
    "efficient": scaled(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": scaled(SDPBackend.CUDNN_ATTENTION),
    "math": scaled(SDPBackend.MATH),
    "written out": written_out,
    "packed": packed,
    "flex": flex,
}


def segments(shape: Shape) -> Tensor:
    lengths = torch.tensor(shape.lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths)[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # torch says of each kernel why it does not take a shape
    rows = []
    for shape in QUICK if options.quick else SHAPES[options.device]:
        print(f"{shape.name} ...", flush=True)
        rows.append(compare(shape, torch.device(options.device), options.runs))
        write(rows, options)
    lines = []
    for row in rows:
        others = {name: s for name, s in row["seconds"].items() if name != "pick"}
        best = min(others, key=lambda name: others[name])
        cells = [f"{1e3 * row['seconds']['pick']:.1f}", f"{1e3 * others[best]:.1f}", best]
        lines.append([row["shape"]["name"], *cells, f"{others[best] / row['seconds']['pick']:.2f}"])
    print(table(["documents", "pick ms", "best ms", "best", "best / pick"], lines))


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """What there is so far: compiling takes minutes on a GPU."""
    if not options.quick or options.out:
        out = options.out or BENCH / "results" / f"attention-{options.device}.json"
        settings = {"threads": options.threads, "runs": options.runs, "torch": torch.__version__}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(as_json({"machine": machine(), "settings": settings, "shapes": rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--out", type=Path, help="default: bench/results/attention-DEVICE.json")
    return parser.parse_args()


def compare(shape: Shape, device: torch.device, runs: int) -> dict[str, Any]:
    """Median seconds of each candidate, on a GPU the memory it took beyond its inputs, and who is out."""
    torch.manual_seed(0)
    size = sum(shape.lengths)
    q, k, v = (
        torch.randn(1, size, heads, shape.dim, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    slope = torch.randn_like(q)

    def run(name: str) -> tuple[float, list[Tensor]]:
        _wait(device)
        start = time.perf_counter()
        out = CANDIDATES[name](q, k, v, shape)
        found = [out.detach(), *torch.autograd.grad(out, (q, k, v), slope)]
        _wait(device)
        return time.perf_counter() - start, found

    wanted = None
    if size <= ALL_PAIRS:
        out = written_out(q, k, v, shape)
        wanted = [out.detach(), *torch.autograd.grad(out, (q, k, v), slope)]
    taken: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in CANDIDATES:
        try:
            base = _reset(device)
            found = run(name)[1]
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() - base
        except (ValueError, RuntimeError) as error:
            left_out[name] = (str(error).splitlines() or ["fails"])[0][:100]
            continue
        for one, other in zip(found, wanted or found, strict=True):
            if (one - other).float().norm() > 3e-2 * other.float().norm():
                left_out[name] = "its result is another one"
        if name not in left_out:
            taken[name] = []
    for _ in range(runs):
        for name, times in taken.items():
            times.append(run(name)[0])
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return {"shape": asdict(shape), "seconds": seconds, "bytes": memory, "left_out": left_out}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()

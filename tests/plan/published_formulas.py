"""Closed formulas of the papers that the planner is checked against, each in its own convention.

They are algebra, not machines: what they leave out (runtime, fragments, buffers) the planner's own counting
has.
"""

from typing import Literal

Kept = Literal["none", "tensor", "sequence", "selective", "sequence_selective", "full"]


def zero_bytes(parameters: float, processes: int, stage: Literal[0, 1, 2, 3], state: float = 12) -> float:
    """Bytes of model states on one device under ZeRO (arXiv 1910.02054, section 5): 2 for a 16-bit weight,
    2 for its gradient, `state` for the optimizer (12: float32 master and Adam's two moments)."""
    parts = {0: (1, 1, 1), 1: (1, 1, processes), 2: (1, processes, processes), 3: (processes,) * 3}[stage]
    return parameters * (2 / parts[0] + 2 / parts[1] + state / parts[2])


def activation_bytes(sequence: int, rows: int, hidden: int, heads: int, tensor: int, kept: Kept) -> float:
    """Bytes of one layer's 16-bit activations on one device (arXiv 2205.05198, Table 2).

    none: one device; tensor: products divided; sequence: what is between them, too; selective: the
    attention's core is recomputed; full: only the layer's input is kept.
    """
    scores = 5 * heads * sequence / hidden
    per = {
        "none": 34 + scores,
        "tensor": 10 + 24 / tensor + scores / tensor,
        "sequence": (34 + scores) / tensor,
        "selective": 10 + 24 / tensor,
        "sequence_selective": 34 / tensor,
        "full": 2.0,
    }[kept]
    return sequence * rows * hidden * per


def first_stage_bytes(per_layer: float, layers: int, pipeline: int, chunks: int = 1) -> float:
    """Activations that the first stage of a 1F1B pipeline holds: L layers' worth whatever its depth;
    interleaved in `chunks` per device, 1 + (p - 1) / (p m) times that (arXiv 2205.05198, equation 5 and
    section 4.2.3)."""
    return per_layer * layers * (1 + (pipeline - 1) / (pipeline * chunks) if chunks > 1 else 1)


def megatron_parameters(layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """Weights of a GPT with learned positions (arXiv 2104.04473, equation 2)."""
    return (
        12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocabulary + sequence) / (12 * layers * hidden))
    )


def megatron_flops(
    batch: int,
    sequence: int,
    layers: int,
    hidden: int,
    vocabulary: int,
    counted: Literal["model", "selective", "full"] = "model",
) -> float:
    """FLOPs of one iteration, all (query, key) pairs counted, the embedding as the head alone.

    model: what the mathematics asks for, coefficient 72 (arXiv 2205.05198, equation 7); selective: what the
    hardware does when attention is recomputed (equation 8); full: with every layer recomputed, coefficient 96
    (arXiv 2104.04473, equation 3).
    """
    span, head = sequence / hidden, vocabulary / (layers * hidden)
    factor, within = {
        "model": (72, 1 + span / 6 + head / 12),
        "selective": (72, 1 + span / 3 + head / 12),
        "full": (96, 1 + span / 6 + head / 16),
    }[counted]
    return factor * batch * sequence * layers * hidden**2 * within


def bubble_fraction(pipeline: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle time of a pipeline over its ideal time (arXiv 2104.04473, section 2.2)."""
    return (pipeline - 1) / (chunks * micro_batches)


def nf4_bytes(parameters: float, double: bool = True) -> float:
    """Bytes of weights in 4 bits: a block of 64 shares a float32; that in 8 bits in blocks of 256 (arXiv
    2305.14314)."""
    constants = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return parameters * (4 + constants) / 8

"""Silent corruption: a processor or a memory that computes or keeps something else without an error.

Two checks on steps that the recipe chooses. A step's forward and backward pass is done twice, and its losses,
its gradient norm and the bits of its gradients must be the same. And processes that are replicas of each
other must hold the same bits of every weight and optimizer state.

A check sum is the sum of a tensor's bytes, eight at a time taken as an integer, modulo 2^64: any one bit that
is flipped changes it.
"""

import socket
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ropewalk.errors import RopewalkError
from ropewalk.parallel import World, local, replicas

ADVICE = (
    "a processor or a memory there computes or keeps wrong numbers; this step was not updated with them: "
    "take it out, and go on from a checkpoint before it began with: ropewalk resume RUN"
)


def check_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """By name, the sum of the bits of (this process's part of) each tensor; one wait for the device."""
    sums = [_check_sum(local(tensor)) for tensor in tensors.values()]
    if not sums:
        return {}
    # to the GPU, where there is one: nothing waits for what goes there
    device = next((one.device for one in sums if one.is_cuda), torch.device("cpu"))
    numbers = torch.stack([one.to(device, non_blocking=True) for one in sums]).tolist()
    return dict(zip(tensors, numbers, strict=True))


def _check_sum(tensor: Tensor) -> Tensor:
    raw = tensor.reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    return raw[:whole].view(torch.int64).sum() + raw[whole:].sum(dtype=torch.int64)


def compute_twice(
    compute: Callable[[], list[float]],
    gradients: Callable[[], Mapping[str, Tensor]],
    discard: Callable[[], None],
    world: World,
    step: int,
) -> list[float]:
    """A step's numbers, after its second computation gave the same bits in every process.

    `compute` gives the numbers, and leaves gradients that `gradients` gives and `discard` drops.
    RopewalkError, naming process and host, where one did not. Then it is done a third time: where all
    three differ, it is the computation itself that gives other bits each time, and the message says so.
    """
    random = torch.get_rng_state()
    random_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def printed(numbers: list[float]) -> Any:
        return [number.hex() for number in numbers], check_sums(gradients())

    def once_more() -> Any:
        discard()
        torch.set_rng_state(random)
        if random_gpu is not None:
            torch.cuda.set_rng_state(random_gpu)
        return printed(compute())

    numbers = compute()
    first, second = printed(numbers), once_more()
    notes = world.each((socket.gethostname(), first, second))
    if all(one == two for _, one, two in notes):
        return numbers
    third = world.each(once_more())
    odd = [rank for rank, (_, one, two) in enumerate(notes) if one != two]
    if all(third[rank] not in notes[rank][1:] for rank in odd):
        raise RopewalkError(
            f"step {step}: train.verify_every computed it three times, with three results: the operations of "
            "this device add in changing order, so that this check cannot tell; set train.verify_every: 0"
        )
    # what one process gets wrong in a forward pass, all get in the gradients that they add up
    guilty = [rank for rank in odd if notes[rank][1][0][:-1] != notes[rank][2][0][:-1]] or odd
    who = " and ".join(f"process {rank} on {notes[rank][0]}" for rank in guilty)
    what = _difference(*notes[guilty[0]][1:])
    raise RopewalkError(f"step {step}: {who} computed {what} when the step was done again; {ADVICE}")


def _difference(first: Any, second: Any) -> str:
    (numbers, sums), (other_numbers, other_sums) = first, second
    if numbers[:-1] != other_numbers[:-1]:
        pairs = zip(numbers[:-1], other_numbers[:-1], strict=True)
        one, two = next((float.fromhex(a), float.fromhex(b)) for a, b in pairs if a != b)
        return f"another loss ({one:.9g}, then {two:.9g} in sum)"
    names = [name for name, value in sums.items() if other_sums.get(name) != value]
    return f"another gradient of {names[0]}" if names else "another gradient norm"


def compare_replicas(tensors: Mapping[str, Tensor], world: World, step: int) -> None:
    """RopewalkError, naming process, host and tensor, where replicas do not hold the same bits."""
    if world.layout.replicate * world.layout.pipeline == 1:
        return
    notes = world.each((socket.gethostname(), check_sums(tensors)))
    for name in dict.fromkeys(name for _, sums in notes for name in sums):
        for alike in replicas(name.partition(".")[2], world):
            ranks = [rank for rank in alike if name in notes[rank][1]]
            if not ranks:  # of experts that others have
                continue
            sums = Counter(notes[rank][1][name] for rank in ranks)
            if len(sums) == 1:
                continue
            (usual, count), *_ = sums.most_common()
            odd = [rank for rank in ranks if notes[rank][1][name] != usual]
            if 2 * count <= len(ranks):  # nobody knows which
                odd = list(ranks)
            who = " and ".join(f"process {rank} on {notes[rank][0]}" for rank in odd)
            verb = "holds other bits than its replicas" if len(odd) == 1 else "hold different bits"
            raise RopewalkError(f"step {step}: {who} {verb} of {name}; {ADVICE}")

"""How the C library hands out memory while a model is trained on a CPU."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 16 << 20


def give_back_large_blocks() -> None:
    """Tensors of 16 MiB and more get pages of their own from now on, given back when they are freed.

    glibc learns from blocks that are freed: after a few large ones, whatever is smaller than 32 MiB comes
    from one heap. There the block inputs that a long row keeps come to lie between what was freed, and a gap
    that the next tensor does not fit into is lost: a row of 16,384 tokens took 2.6 GB instead of 1.6 (16
    layers of SmolLM2-135M's shape). Fresh pages cost time, which large tensors do not notice (at 4 MiB a step
    takes 10% longer). Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE)  # what glibc would have come to; fixing the one unfixes the other

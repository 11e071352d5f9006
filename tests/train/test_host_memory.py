"""A large tensor's memory is the machine's again as soon as the tensor is gone, whatever lies beside it."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, torch
from ropewalk.train.host_memory import give_back_large_blocks

class Account(ctypes.Structure):  # malloc.h: struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
account = ctypes.CDLL(None).mallinfo2
account.restype = Account

def resident():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

give_back_large_blocks()
def large():
    return torch.ones(24 << 20, dtype=torch.uint8)
for _ in range(3):
    large()  # freed: what glibc would learn from
before = account().hblks
blocks = [large() for _ in range(8)]
mapped, full = account().hblks - before, resident()
del blocks[::2]  # every other one: gaps
print(mapped, full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_large_tensors_are_given_back() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    mapped, freed = map(int, done.stdout.split())
    assert mapped == 8  # each has pages of its own
    assert freed >= 90  # MB: 4 of 24

"""The peak against which MFU is taken: the data sheet's on a known GPU, else the best of ten products."""

import time

import torch
from common import read_job, report

from ropewalk.train.flops import peak_flops

SIZE = 2048


def main() -> None:
    job = read_job()
    device = job["device"]
    known = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if device == "cuda" else None
    report(job, (), flops_per_s=known or measured(device))


def measured(device: str) -> float:
    best = float("inf")
    for dtype in (torch.bfloat16, torch.float32):  # there are processors that are faster at float32
        a, b = (torch.randn(SIZE, SIZE, device=device, dtype=dtype) for _ in range(2))
        for _ in range(10):
            began = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return 2 * SIZE**3 / best


if __name__ == "__main__":
    main()

"""Seconds of single kernels on a device: a roofline in which moving and computing are added, not overlapped.

A product of [M, K] and [K, N] takes its FLOPs at the share of the peak that large products reach, and its
bytes at the memory's rate. For large shapes the second part vanishes; for thin ones (a tensor-parallel
slice, a head of 64) it is what slows real kernels down: tiles that are read again, and edges that are
computed for nothing. Each device has the same few shares (`hardware.Accelerator`) for all shapes.
"""

from dataclasses import dataclass

from ropewalk.plan.hardware import Accelerator, precision_name

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 2, "int8": 1}
"""of an activation; float8's products read a byte, and what is around them two"""


@dataclass(frozen=True)
class Kernels:
    """A device computing in one precision."""

    device: Accelerator
    precision: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", precision_name(self.precision))
        self.device.peak_of(self.precision)

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]

    @property
    def _memory(self) -> float:
        return self.device.memory_bandwidth * self.device.memory_share

    def product(self, m: float, n: float, k: float, times: float = 1, small: bool = False) -> float:
        """`times` products [m, k] x [k, n]; `small`: one of attention's, which float8 leaves alone."""
        if not m or not n or not k or not times:
            return 0.0
        device, precision = self.device, self.precision
        if precision == "float8" and small:
            precision = "bfloat16"
        share = device.matmul
        if precision == "float8":
            share = device.matmul_float8 or device.matmul
        compute = 2 * m * n * k / (device.peak_of(precision) * share)
        moved = self.width * (m * k + k * n + m * n) / self._memory
        cast = 3 * (m * k + k * n) / self._memory if precision == "float8" else 0.0  # read 2 bytes, write 1
        return times * (compute + moved + cast) + device.launch

    def moved(self, elements: float, kernels: int = 1) -> float:
        """Elementwise kernels that read and write so many values of the activations' type."""
        return elements * self.width / self._memory + kernels * self.device.launch

    def copied(self, count: float) -> float:
        """Kernels that read and write so many bytes."""
        return count / self._memory

    def fused_attention(self, flops: float, backward: bool = False) -> float:
        """Seconds of attention that never writes its scores; flops: of the pairs that are attended."""
        device = self.device
        precision = "bfloat16" if self.precision == "float8" else self.precision
        share = device.attention_backward if backward else device.attention
        return flops / (device.peak_of(precision) * share) + device.launch

"""Limits and rates of the GPUs that the kernels are compiled for, by compute capability."""

from typing import NamedTuple

REGISTERS = 64 * 1024
"""registers of a multiprocessor, 32 bits each; the same for all these chips"""


class Chip(NamedTuple):
    """A GPU: the limits of a multiprocessor, and what it does per clock cycle.

    Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Lanes: its table "Throughput
    of Native Arithmetic Instructions". The rest: NVIDIA's data sheets and architecture white papers; the clock is the
    boost clock for which they state the peak.
    """

    name: str
    multiprocessors: int
    clock: float
    """MHz"""
    bandwidth: int
    """of device memory, GB/s"""
    fp32_lanes: int
    """float32 multiply-adds per cycle and multiprocessor"""
    tensor_lanes: int
    """16-bit multiply-adds, accumulated in float32, on the tensor cores; half as many in TF32"""
    warps: int
    programs: int
    """resident thread blocks; Triton calls one a program"""
    shared: int
    """bytes of shared memory of a multiprocessor"""
    reserved: int
    """bytes of shared memory that the system takes for each program"""

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may use."""
        return self.shared - self.reserved


CHIPS = {
    75: Chip("T4", 40, 1590, 320, 64, 512, 32, 16, 64 * 1024, 0),
    80: Chip("A100 SXM 80 GB", 108, 1410, 2039, 64, 1024, 64, 32, 164 * 1024, 1024),
    86: Chip("RTX 3090", 82, 1695, 936, 128, 256, 48, 16, 100 * 1024, 1024),
    89: Chip("RTX 4090", 128, 2520, 1008, 128, 256, 48, 24, 100 * 1024, 1024),
    90: Chip("H100 SXM", 132, 1830, 3350, 128, 2048, 64, 32, 228 * 1024, 1024),
    120: Chip("RTX 5090", 170, 2407, 1792, 128, 256, 48, 24, 100 * 1024, 1024),
}
"""by compute capability"""

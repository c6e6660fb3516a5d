"""What a computation costs by definition, and what the device can do at most."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

CEILING_SIZES = {"cpu": 2048}
GPU_CEILING_SIZE = 8192
CEILING_ROUNDS = 10


def count_flops(run: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions in one call of `run`, which is not compiled.

    Unpadded; what is recomputed in the backward pass counts, so give it a model without checkpointing.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return float(counter.get_total_flops())


@cache
def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product, the best of some: the measured ceiling that MFU is a share of."""
    size = CEILING_SIZES.get(device.type, GPU_CEILING_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(CEILING_ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

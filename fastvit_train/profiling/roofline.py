"""The FLOPs of a computation, and the highest FLOP/s that the device reaches (the ceiling of a roofline plot)."""

from collections.abc import Callable
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit_train.utils.timing import synchronize, time_call

CEILING_SIZES = {"cpu": 2048}
GPU_CEILING_SIZE = 8192
CEILING_ROUNDS = 10


def count_flops(run: Callable[[], object]) -> float:
    """Count the floating-point operations of the matrix products and convolutions in one call of `run`.

    A multiply and an add are 2. `run` must not be compiled. Operations that the backward pass recomputes are counted,
    so a model must not use activation checkpointing.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return float(counter.get_total_flops())


@cache
def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of a large square matrix product, the best of several: MFU is relative to this ceiling."""
    size = CEILING_SIZES.get(device.type, GPU_CEILING_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    synchronize(device)
    seconds = (time_call(lambda: a @ b, device) for _ in range(CEILING_ROUNDS))
    return 2 * size**3 / min(seconds)

"""Muon's update of many matrices on a CPU as one C++ kernel, in float32."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvit_kernels.cpp.library import addresses, cpp_library, why_unavailable

if TYPE_CHECKING:
    from fastvit_kernels.muon import MuonStep

MAX_SHORT_SIDE = 256
"""Larger matrices do not fit in a processor's second-level cache, and torch's products are faster."""


@functools.cache
def is_available() -> bool:
    """Whether the kernel can be compiled on this machine; the first call compiles it."""
    try:
        return why_unavailable() is None and _library() is not None
    except ValueError:  # a broken compiler, which the attention and the blocks report
        return False


def _library() -> ctypes.CDLL:
    return cpp_library(("matmul.h", "muon.cpp"), torch.float32)


class _Step(ctypes.Structure):
    """The struct `Step` of muon.cpp."""

    _fields_ = (
        ("parameters", ctypes.c_int64),
        ("merged", ctypes.c_int64),
        ("iterations", ctypes.c_int64),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("c", ctypes.c_float),
        ("lr", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("grad_scale", ctypes.c_float),
        ("nesterov", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


def update(weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], step: MuonStep) -> None:
    """See `fastvit_kernels.muon.update_matrices`. The result does not depend on the number of threads."""
    if step.found_inf is not None and step.found_inf:
        return
    shapes = [(weight.shape[0] // step.merged, weight.shape[1:].numel()) for weight in weights]
    settings = _Step(
        len(weights),
        step.merged,
        step.iterations,
        *step.quintic,
        float(step.lr),
        step.weight_decay,
        step.momentum,
        1.0 if step.grad_scale is None else float(step.grad_scale),
        step.nesterov,
        torch.get_num_threads(),
    )
    contiguous = [gradient.contiguous() for gradient in gradients]
    sides = (ctypes.c_int64 * (2 * len(shapes)))(*(side for shape in shapes for side in shape))
    _library().update(ctypes.byref(settings), sides, *map(addresses, (weights, contiguous, averages)))

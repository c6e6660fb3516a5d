"""Muon's update of small matrices, many in one call: a Triton kernel for GPUs, a C++ kernel for CPUs."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.cpp import muon as cpp_muon
from fastvit_kernels.registry import implementations


class MuonStep(NamedTuple):
    """The settings of a step of Muon."""

    lr: float | Tensor
    """learning rate, a float or a scalar tensor on the device; the update's root mean square is 0.2 times that"""
    merged: int
    """number of matrices that are stacked in each weight"""
    weight_decay: float
    """decoupled, as in AdamW"""
    momentum: float
    """of the moving average of gradients"""
    nesterov: bool
    """use Nesterov momentum"""
    quintic: tuple[float, float, float]
    """coefficients of x, x^3 and x^5 in the Newton-Schulz iteration"""
    iterations: int
    """of Newton-Schulz"""
    grad_scale: Tensor | None = None
    """what the gradients must be divided by, a scalar; None for 1"""
    found_inf: Tensor | None = None
    """a scalar; if it is not 0, nothing changes"""


def can_update(weight: Tensor, merged: int) -> bool:
    """Whether `update_matrices` supports the `merged` matrices that are stacked in `weight`.

    They must be float32 and contiguous, and up to 64 wide or high on a GPU that Triton's kernels support, or up to 256
    on a CPU with a C++ compiler.
    """
    if weight.is_cpu:
        return fits(weight, merged, cpp_muon.MAX_SHORT_SIDE) and cpp_muon.is_available()
    if not weight.is_cuda or not _has_triton():
        return False
    from fastvit_kernels.triton_kernels import muon as triton_muon  # triton may not be installed

    return fits(weight, merged, triton_muon.MAX_SHORT_SIDE)


def fits(weight: Tensor, merged: int, max_short_side: int) -> bool:
    """Whether a kernel for matrices of up to `max_short_side` wide or high supports those stacked in `weight`."""
    rows, columns = weight.shape[0] // merged, weight.shape[1:].numel()
    return min(rows, columns) <= max_short_side and weight.dtype == torch.float32 and weight.is_contiguous()


@functools.cache
def _has_triton() -> bool:
    return implementations()["triton"] is None


def update_matrices(weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], step: MuonStep) -> None:
    """Take a step of Muon, in place, without waiting for a GPU; products are computed in about float32's precision.

    Args:
        weights: matrices that `can_update` accepts, of any shapes, (out, in); all dimensions after the first count as
            one.
        gradients: of the weights.
        averages: the moving averages of the gradients.
        step: the settings.
    """
    if weights[0].is_cpu:
        cpp_muon.update(weights, gradients, averages, step)
        return
    from fastvit_kernels.triton_kernels import muon as triton_muon  # triton may not be installed

    triton_muon.update(weights, gradients, averages, step)

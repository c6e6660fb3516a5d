"""Muon's update of small matrices on a GPU, many in one launch."""

import functools

import torch
from torch import Tensor

from fastvit_kernels.registry import implementations


def can_update(weight: Tensor, merged: int) -> bool:
    """Whether `update_matrices` supports the `merged` matrices that are stacked in `weight`.

    They must be on a GPU that Triton's kernels support, float32, contiguous, and up to 64 wide or high.
    """
    if not weight.is_cuda or not _has_triton():
        return False
    from fastvit_kernels.triton_kernels.muon import fits  # triton may not be installed

    return fits(weight, merged)


@functools.cache
def _has_triton() -> bool:
    return implementations()["triton"] is None


def update_matrices(
    weights: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    lr: float | Tensor,
    *,
    merged: int,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    quintic: tuple[float, float, float],
    steps: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Take a step of Muon, in place, without waiting for the GPU; products are computed in about float32's precision.

    Args:
        weights: matrices that `can_update` accepts, of any shapes, (out, in); all dimensions after the first count as
            one.
        gradients: of the weights.
        averages: the moving averages of the gradients.
        lr: learning rate, a float or a scalar tensor on the GPU. The root mean square of the update is 0.2 times that.
        merged: number of matrices that are stacked in each weight.
        weight_decay: decoupled, as in AdamW.
        momentum: of the moving average.
        nesterov: use Nesterov momentum.
        quintic: coefficients of x, x^3 and x^5 in the Newton-Schulz iteration.
        steps: Newton-Schulz iterations.
        grad_scale: what the gradients must be divided by, a scalar tensor; None for 1.
        found_inf: a scalar tensor; if it is not 0, nothing changes.
    """
    from fastvit_kernels.triton_kernels.muon import (
        MAX_PARAMETERS,
        constants,
        muon_kernel,
    )  # triton may not be installed

    with torch.cuda.device_of(weights[0]):
        for first in range(0, len(weights), MAX_PARAMETERS):
            part = slice(first, first + MAX_PARAMETERS)
            shapes = tuple((weight.shape[0], weight.shape[1:].numel()) for weight in weights[part])
            muon_kernel[(len(shapes) * merged,)](
                tuple(weights[part]),
                tuple(gradient.contiguous() for gradient in gradients[part]),
                tuple(averages[part]),
                0.0 if isinstance(lr, Tensor) else lr,
                lr if isinstance(lr, Tensor) else None,
                weight_decay,
                momentum,
                grad_scale,
                found_inf,
                **constants(shapes, merged, nesterov, quintic, steps),
            )

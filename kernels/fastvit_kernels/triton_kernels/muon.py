"""Muon's update of many small matrices in one Triton kernel, in float32.

Each program updates a whole matrix: it reads the gradient and its moving average twice, in tiles along the longer side,
and keeps only square tiles of the shorter side. With G = A A^T every Newton-Schulz iterate of A is a polynomial in G
times A, so the iterations run on G and on the polynomial alone, and A is needed only for G and at the end.

Shape suffixes: S the shorter side, padded; L a tile of the longer side.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.triton_kernels.parts import dot, padded

if TYPE_CHECKING:
    from fastvit_kernels.muon import MuonStep

MAX_SHORT_SIDE = 64
"""larger square tiles do not fit in the registers of a program"""
LONG_TILE = 32
MAX_PARAMETERS = 128
"""per launch: the addresses of three tensors of each must fit in the 4 KiB of a kernel's arguments"""
PRECISION = "tf32x3"
"""three products of TensorFloat-32, about as accurate as one of float32, which would not use the tensor cores"""


def update(weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], step: "MuonStep") -> None:
    """See `fastvit_kernels.muon.update_matrices`."""
    with torch.cuda.device_of(weights[0]):
        for first in range(0, len(weights), MAX_PARAMETERS):
            part = slice(first, first + MAX_PARAMETERS)
            shapes = tuple((weight.shape[0], weight.shape[1:].numel()) for weight in weights[part])
            muon_kernel[(len(shapes) * step.merged,)](
                tuple(weights[part]),
                tuple(gradient.contiguous() for gradient in gradients[part]),
                tuple(averages[part]),
                0.0 if isinstance(step.lr, Tensor) else step.lr,
                step.lr if isinstance(step.lr, Tensor) else None,
                step.weight_decay,
                step.momentum,
                step.grad_scale,
                step.found_inf,
                **constants(shapes, step.merged, step.nesterov, step.quintic, step.iterations),
            )


def constants(
    shapes: tuple[tuple[int, int], ...], merged: int, nesterov: bool, quintic: tuple[float, float, float], steps: int
) -> dict[str, Any]:
    """Return the compile-time arguments and the launch options; `shapes` are (rows, columns) of stacked matrices."""
    sides = [(rows // merged, columns) for rows, columns in shapes]
    return {
        "SHAPES": shapes,
        "MERGED": merged,
        "NESTEROV": nesterov,
        "QUINTIC": quintic,
        "STEPS": steps,
        "S_PAD": padded(max(map(min, sides))),
        "MAX_LONG": max(map(max, sides)),
        "L_TILE": LONG_TILE,
        "PRECISION": PRECISION,
        "num_warps": 8,
        "num_stages": 1,  # tiles in flight would cost registers
    }


@triton.jit
def muon_kernel(
    weights,
    gradients,
    averages,
    lr,
    lr_ptr,
    weight_decay,
    momentum,
    grad_scale_ptr,
    found_inf_ptr,
    SHAPES: tl.constexpr,
    MERGED: tl.constexpr,
    NESTEROV: tl.constexpr,
    QUINTIC: tl.constexpr,
    STEPS: tl.constexpr,
    S_PAD: tl.constexpr,
    MAX_LONG: tl.constexpr,
    L_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update matrix pid % MERGED of parameter pid // MERGED; the lists have an entry per parameter."""
    if found_inf_ptr is not None:  # noqa: SIM102  # in a kernel, `and` evaluates both sides
        if tl.load(found_inf_ptr) != 0:
            return
    parameter = tl.program_id(0) // MERGED
    weight_ptr, gradient_ptr, average_ptr = weights[0], gradients[0], averages[0]
    rows, columns = SHAPES[0][0], SHAPES[0][1]
    for i in tl.static_range(1, len(SHAPES)):
        if parameter == i:
            weight_ptr, gradient_ptr, average_ptr = weights[i], gradients[i], averages[i]
            rows, columns = SHAPES[i][0], SHAPES[i][1]
    rows = rows // MERGED
    offset = tl.program_id(0) % MERGED * rows * columns
    short, long = tl.minimum(rows, columns), tl.maximum(rows, columns)
    stride_s = tl.where(rows <= columns, columns, 1)
    stride_l = tl.where(rows <= columns, 1, columns)
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)

    s_S = tl.arange(0, S_PAD)
    l_L = tl.arange(0, L_TILE)
    gram_SS = tl.zeros((S_PAD, S_PAD), tl.float32)
    for start in range(0, MAX_LONG, L_TILE):
        at_SL = offset + s_S[:, None] * stride_s + (start + l_L[None, :]) * stride_l
        exists_SL = (s_S[:, None] < short) & (start + l_L[None, :] < long)
        _, ahead_SL = _moving_average(
            average_ptr + at_SL, gradient_ptr + at_SL, exists_SL, momentum, grad_scale, NESTEROV
        )
        gram_SS += dot(ahead_SL, tl.trans(ahead_SL), PRECISION)

    is_diagonal_SS = s_S[:, None] == s_S[None, :]
    norm = tl.maximum(tl.sqrt(tl.sum(tl.sum(tl.where(is_diagonal_SS, gram_SS, 0.0), 1), 0)), 1e-7)
    gram_SS /= norm * norm
    product_SS = tl.where(is_diagonal_SS, 1 / norm, 0.0)
    for _ in range(STEPS):
        polynomial_SS = QUINTIC[1] * gram_SS + QUINTIC[2] * dot(gram_SS, gram_SS, PRECISION)
        polynomial_SS += tl.where(is_diagonal_SS, QUINTIC[0], 0.0)
        product_SS = dot(polynomial_SS, product_SS, PRECISION)
        gram_SS = dot(dot(polynomial_SS, gram_SS, PRECISION), polynomial_SS, PRECISION)

    for start in range(0, MAX_LONG, L_TILE):
        at_SL = offset + s_S[:, None] * stride_s + (start + l_L[None, :]) * stride_l
        exists_SL = (s_S[:, None] < short) & (start + l_L[None, :] < long)
        average_SL, ahead_SL = _moving_average(
            average_ptr + at_SL, gradient_ptr + at_SL, exists_SL, momentum, grad_scale, NESTEROV
        )
        update_SL = 0.2 * tl.sqrt(long.to(tl.float32)) * dot(product_SS, ahead_SL, PRECISION)
        weight_SL = tl.load(weight_ptr + at_SL, exists_SL, 0.0)
        tl.store(average_ptr + at_SL, average_SL, exists_SL)
        tl.store(weight_ptr + at_SL, weight_SL * (1 - lr * weight_decay) - lr * update_SL, exists_SL)


@triton.jit
def _moving_average(average_ptr_SL, gradient_ptr_SL, exists_SL, momentum, grad_scale, NESTEROV: tl.constexpr):
    """Return the new average of the gradients, and the matrix to orthogonalise."""
    gradient_SL = tl.load(gradient_ptr_SL, exists_SL, 0.0) / grad_scale
    average_SL = tl.load(average_ptr_SL, exists_SL, 0.0)
    average_SL += (1 - momentum) * (gradient_SL - average_SL)
    ahead_SL = average_SL
    if NESTEROV:
        ahead_SL = gradient_SL + momentum * (average_SL - gradient_SL)
    return average_SL, ahead_SL

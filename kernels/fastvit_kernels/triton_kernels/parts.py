"""Functions that the Triton kernels share.

Shape suffixes: M query rows, N key rows, C channels of one head, all padded.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_TILE = 16
"""the smallest dimension that tl.dot supports on a GPU; Triton's interpreter accepts smaller ones"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""whether the kernels run in Triton's interpreter, on the CPU, which tests only their results"""


def padded(size: int) -> int:
    """Return the smallest tile size that holds `size`: a power of two, at least 16."""
    return max(MIN_TILE, triton.next_power_of_2(size))


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's precision: TF32 if torch's own float32 matmul may use it, otherwise full precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def new_seed(x: Tensor) -> Tensor:
    """Draw a dropout seed, (1,) int64 on x's device, from torch's generator.

    This needs no synchronisation. Gradient checkpointing draws the same seed again, and each replay of a CUDA graph
    draws a new one.
    """
    return torch.randint(2**62, (1,), device=x.device)


@triton.jit
def dot(a_MK, b_KN, PRECISION: tl.constexpr):
    """Multiply a @ b, accumulated in float32."""
    tl.static_assert(a_MK.shape[0] >= 16)
    tl.static_assert(a_MK.shape[1] >= 16)
    tl.static_assert(b_KN.shape[1] >= 16)
    if INTERPRETED:  # the interpreter's tl.dot misreads bfloat16 as integers
        a_MK = a_MK.to(tl.float32)
        b_KN = b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """Convert float32 `value` to `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates instead of rounding
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def softmax(scores_MN, key_exists_N, scale_log2):
    """Compute the softmax of whole rows of `scores * scale`; scale_log2 is scale * log2(e). Padding keys get 0."""
    scores_MN = tl.where(key_exists_N[None, :], scores_MN * scale_log2, float("-inf"))
    exp_MN = tl.exp2(scores_MN - tl.max(scores_MN, 1)[:, None])
    return exp_MN / tl.sum(exp_MN, 1)[:, None]


@triton.jit
def dropout_factor(seed, head_index, row_M, key_N, dropout_p, N: tl.constexpr):
    """Return the factor of each attention weight, 0 or 1/(1-p).

    It depends only on the arguments (Philox), so the forward and the backward pass draw the same factors.
    """
    draw_MN = tl.rand(seed + head_index, row_M[:, None] * N + key_N[None, :])
    return tl.where(draw_MN >= dropout_p, 1 / (1 - dropout_p), 0.0)


@triton.jit
def softmax_backward(probs_MN, dprobs_MN):
    """Compute the gradient of the scaled scores from the gradient of the probabilities."""
    return probs_MN * (dprobs_MN - tl.sum(probs_MN * dprobs_MN, 1)[:, None])

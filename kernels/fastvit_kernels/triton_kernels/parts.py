"""Functions that the Triton kernels share.

Shape suffixes: M query rows, N key rows, C channels of one head, all padded.
"""

import functools
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
PHILOX_ROUNDS = tl.constexpr(7)
"""the fewest with which Philox4x32 passes all tests of BigCrush (Salmon et al. 2011)"""


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; in Triton's interpreter any number will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def weight_gradient_groups(blocks: int, programs: int, multiprocessors: int) -> int:
    """Return the number of groups that `blocks` of tokens are divided into; `programs` programs handle each group.

    Two programs per multiprocessor have enough registers for the gradients of parameters.
    """
    return min(blocks, triton.cdiv(2 * multiprocessors, programs))


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
def dropout_factor(seed, head_index, row_M, dropout_p, N_PAD: tl.constexpr):
    """Return the factor of each attention weight, 0 or 1/(1-p), (M, N_PAD).

    A factor depends only on the seed, the head's index in the batch, the query and the key, which are the key and the
    counter of Philox, so the forward and the backward pass draw the same factors. One call draws those of four keys,
    whose indices differ in bits 0 and 3: a tensor core gives the scores of these to one thread, so that no factor has
    to move to another.
    """
    query_MG = row_M[:, None]
    group_MG = tl.arange(0, N_PAD // 4)[None, :]
    head_MG = tl.full((1, 1), 0, tl.int32) + head_index.to(tl.int32)
    draws = tl.philox(seed, query_MG, group_MG, head_MG, tl.full((1, 1), 0, tl.int32), PHILOX_ROUNDS)
    dropped = tl.cast(dropout_p * 2.0**32, tl.uint32)
    even_MG2 = tl.join(draws[0] >= dropped, draws[1] >= dropped)
    odd_MG2 = tl.join(draws[2] >= dropped, draws[3] >= dropped)
    keep_M4422 = tl.join(even_MG2, odd_MG2).reshape((row_M.shape[0], N_PAD // 16, 4, 2, 2))
    keep_MN = keep_M4422.permute((0, 1, 3, 2, 4)).reshape((row_M.shape[0], N_PAD))
    return tl.where(keep_MN, 1 / (1 - dropout_p), 0.0)


@triton.jit
def softmax_backward(probs_MN, dprobs_MN):
    """Compute the gradient of the scaled scores from the gradient of the probabilities."""
    return probs_MN * (dprobs_MN - tl.sum(probs_MN * dprobs_MN, 1)[:, None])

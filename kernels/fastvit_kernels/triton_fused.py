"""QKV projection and attention in one Triton kernel, for models of up to 64 channels.

A program has a whole sample: it reads x once, and neither QKV nor the scores reach device memory, forward or
backward. The backward pass recomputes them in two kernels, one for x's gradient and one for the weights'. Doing
both in one would read x and dout once less, but its accumulators leave registers for one program per
multiprocessor alone, and these chains of small products live on having several. The weights' gradients stay in
registers over all samples of a program, go into a slice of their own per program, and are summed after: no
atomics, so no race, and the same result each time.

Shape suffixes: B batch, N tokens, D dim, H heads, C channels of one head, M query rows (all N of them here).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.triton_parts import (
    LOG2_E,
    cast,
    dot,
    dot_precision,
    dropout_factor,
    padded,
    softmax,
    softmax_backward,
)

MAX_DIM = 64
MAX_HEAD_DIM = 32
PROGRAMS_PER_MULTIPROCESSOR = 2
"""of the kernel for the weights' gradients, as many as its registers admit"""


def fits(tokens: int, dim: int, num_heads: int, dtype: torch.dtype) -> bool:
    """True where a sample's tokens, a head and its scores fit into the registers and shared memory of a program."""
    max_tokens = 64 if dtype == torch.float32 else 128
    return dim <= MAX_DIM and padded(tokens) <= max_tokens and padded(dim // num_heads) <= MAX_HEAD_DIM


@triton.jit
def _load_tokens(ptr, row_N, column_D, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr):
    """Rows of one sample, padded with zeros."""
    exists_ND = (row_N < N)[:, None] & (column_D < D)[None, :]
    return tl.load(ptr + row_N[:, None] * stride_n + column_D[None, :] * stride_d, mask=exists_ND, other=0.0)


@triton.jit
def _load_weight(w_ptr, first_row, column_D, channel_C, C: tl.constexpr, D: tl.constexpr):
    """C rows of the weight, transposed."""
    exists_DC = (column_D < D)[:, None] & (channel_C < C)[None, :]
    return tl.load(w_ptr + (first_row + channel_C)[None, :] * D + column_D[:, None], mask=exists_DC, other=0.0)


@triton.jit
def _load_head_weights(w_ptr, head, column_D, channel_C, C: tl.constexpr, D: tl.constexpr):
    """One head's query, key and value weights, each transposed."""
    wq_DC = _load_weight(w_ptr, head * C, column_D, channel_C, C, D)
    wk_DC = _load_weight(w_ptr, D + head * C, column_D, channel_C, C, D)
    wv_DC = _load_weight(w_ptr, 2 * D + head * C, column_D, channel_C, C, D)
    return wq_DC, wk_DC, wv_DC


@triton.jit
def _project(
    x_ND, w_DC, bias_ptr, first_row, channel_C, C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    out_NC = dot(x_ND, w_DC, PRECISION)
    if HAS_BIAS:
        out_NC += tl.load(bias_ptr + first_row + channel_C, mask=channel_C < C, other=0.0).to(tl.float32)[None, :]
    return cast(out_NC, x_ND.dtype)


@triton.jit
def _probabilities(
    x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2,
    N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's query, key and value, and its attention probabilities in float32."""
    q_MC = _project(x_ND, wq_DC, bias_ptr, head * C, channel_C, C, HAS_BIAS, PRECISION)
    k_NC = _project(x_ND, wk_DC, bias_ptr, D + head * C, channel_C, C, HAS_BIAS, PRECISION)
    v_NC = _project(x_ND, wv_DC, bias_ptr, 2 * D + head * C, channel_C, C, HAS_BIAS, PRECISION)
    return q_MC, k_NC, v_NC, softmax(dot(q_MC, tl.trans(k_NC), PRECISION), row_N < N, scale_log2)


@triton.jit
def _head_gradients(
    x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
    scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's query, key and value, in x's dtype."""
    q_MC, k_NC, v_NC, probs_MN = _probabilities(
        x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2, N, D, C, HAS_BIAS, PRECISION
    )
    dprobs_MN = dot(dout_MC, tl.trans(v_NC), PRECISION)
    dropped_MN = probs_MN
    if DROPOUT:
        factor_MN = dropout_factor(tl.load(seed_ptr), sample * H + head, row_N, row_N, dropout_p, N)
        dropped_MN = probs_MN * factor_MN
        dprobs_MN *= factor_MN
    dv_NC = dot(tl.trans(cast(dropped_MN, x_ND.dtype)), dout_MC, PRECISION)
    dscores_MN = cast(softmax_backward(probs_MN, dprobs_MN) * scale, x_ND.dtype)
    dq_MC = dot(dscores_MN, k_NC, PRECISION)
    dk_NC = dot(tl.trans(dscores_MN), q_MC, PRECISION)
    return cast(dq_MC, x_ND.dtype), cast(dk_NC, x_ND.dtype), cast(dv_NC, x_ND.dtype)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, seed_ptr, stride_xb, stride_xn, stride_xd, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sample."""
    C: tl.constexpr = D // H
    sample = tl.program_id(0).to(tl.int64)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
    for head in range(H):
        wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, C, D)
        _, _, v_NC, probs_MN = _probabilities(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2, N, D, C, HAS_BIAS, PRECISION
        )
        if DROPOUT:
            probs_MN *= dropout_factor(tl.load(seed_ptr), sample * H + head, row_N, row_N, dropout_p, N)
        out_MC = dot(cast(probs_MN, v_NC.dtype), v_NC, PRECISION)
        pointers_MC = out_ptr + sample * N * D + row_N[:, None] * D + (head * C + channel_C)[None, :]
        exists_MC = (row_N < N)[:, None] & (channel_C < C)[None, :]
        tl.store(pointers_MC, cast(out_MC, out_ptr.dtype.element_ty), mask=exists_MC)


@triton.jit
def backward_x_kernel(
    x_ptr, w_ptr, bias_ptr, dout_ptr, dx_ptr, seed_ptr,
    stride_xb, stride_xn, stride_xd, stride_ob, stride_on, stride_od, scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sample."""
    C: tl.constexpr = D // H
    sample = tl.program_id(0).to(tl.int64)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
    dx_ND = tl.zeros((N_PAD, D_PAD), tl.float32)
    for head in range(H):
        wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, C, D)
        head_dout_ptr = dout_ptr + sample * stride_ob + head * C * stride_od
        dout_MC = _load_tokens(head_dout_ptr, row_N, channel_C, stride_on, stride_od, N, C)
        dq_MC, dk_NC, dv_NC = _head_gradients(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
            scale, scale_log2, dropout_p, N, D, H, C, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
        dx_ND += dot(dq_MC, tl.trans(wq_DC), PRECISION)
        dx_ND += dot(dk_NC, tl.trans(wk_DC), PRECISION)
        dx_ND += dot(dv_NC, tl.trans(wv_DC), PRECISION)
    pointers_ND = dx_ptr + sample * N * D + row_N[:, None] * D + column_D[None, :]
    tl.store(pointers_ND, cast(dx_ND, dx_ptr.dtype.element_ty), mask=(row_N < N)[:, None] & (column_D < D)[None, :])


@triton.jit
def backward_weight_kernel(
    x_ptr, w_ptr, bias_ptr, dout_ptr, dw_ptr, dbias_ptr, seed_ptr,
    stride_xb, stride_xn, stride_xd, stride_ob, stride_on, stride_od, batch, scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program has one head and every so-manieth sample, and its own slice of dw (programs, 3*D, D) and dbias
    (programs, 3*D), both float32."""
    C: tl.constexpr = D // H
    program = tl.program_id(0)
    head = tl.program_id(1)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, C, D)
    dwq_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dwk_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dwv_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dbq_C = tl.zeros((C_PAD,), tl.float32)
    dbk_C = tl.zeros((C_PAD,), tl.float32)
    dbv_C = tl.zeros((C_PAD,), tl.float32)
    for index in range(program, batch, tl.num_programs(0)):
        sample = tl.cast(index, tl.int64)
        x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
        head_dout_ptr = dout_ptr + sample * stride_ob + head * C * stride_od
        dout_MC = _load_tokens(head_dout_ptr, row_N, channel_C, stride_on, stride_od, N, C)
        dq_MC, dk_NC, dv_NC = _head_gradients(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
            scale, scale_log2, dropout_p, N, D, H, C, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
        x_DN = tl.trans(x_ND)
        dwq_DC += dot(x_DN, dq_MC, PRECISION)
        dwk_DC += dot(x_DN, dk_NC, PRECISION)
        dwv_DC += dot(x_DN, dv_NC, PRECISION)
        if HAS_BIAS:
            dbq_C += tl.sum(dq_MC.to(tl.float32), 0)
            dbk_C += tl.sum(dk_NC.to(tl.float32), 0)
            dbv_C += tl.sum(dv_NC.to(tl.float32), 0)
    weight_row_C = head * C + channel_C
    pointers_DC = dw_ptr + program * 3 * D * D + weight_row_C[None, :] * D + column_D[:, None]
    exists_DC = (column_D < D)[:, None] & (channel_C < C)[None, :]
    tl.store(pointers_DC, dwq_DC, mask=exists_DC)
    tl.store(pointers_DC + D * D, dwk_DC, mask=exists_DC)
    tl.store(pointers_DC + 2 * D * D, dwv_DC, mask=exists_DC)
    if HAS_BIAS:
        pointers_C = dbias_ptr + program * 3 * D + weight_row_C
        tl.store(pointers_C, dbq_C, mask=channel_C < C)
        tl.store(pointers_C + D, dbk_C, mask=channel_C < C)
        tl.store(pointers_C + 2 * D, dbv_C, mask=channel_C < C)


def constants(
    tokens: int, dim: int, num_heads: int, has_bias: bool, dropout_p: float, dtype: torch.dtype
) -> dict[str, Any]:
    """The compile-time arguments of all three kernels, and their warps."""
    return {
        "N": tokens,
        "D": dim,
        "H": num_heads,
        "N_PAD": padded(tokens),
        "D_PAD": padded(dim),
        "C_PAD": padded(dim // num_heads),
        "HAS_BIAS": has_bias,
        "DROPOUT": dropout_p > 0,
        "PRECISION": dot_precision(dtype),
        "num_warps": 8 if padded(tokens) > 64 or dtype == torch.float32 or dropout_p else 4,
    }


@torch.library.custom_op("fastvit_kernels::fused_attention", mutates_args=())
def fused_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """See `fastvit_kernels.attention`; `seed`, (1,) int64, is for dropout."""
    batch, tokens, dim = x.shape
    x = _within_int32(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale_log2 = LOG2_E * (dim // num_heads) ** -0.5
    fixed = constants(tokens, dim, num_heads, qkv_bias is not None, dropout_p, x.dtype)
    bias = None if qkv_bias is None else qkv_bias.contiguous()
    with torch.cuda.device_of(x):
        forward_kernel[(batch,)](
            x, qkv_weight.contiguous(), bias, out, seed, *x.stride(), scale_log2, dropout_p, **fixed
        )  # fmt: skip
    return out


@fused_attention.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastvit_kernels::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    dout: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the last is of no use where there is no bias."""
    batch, tokens, dim = x.shape
    x, dout = _within_int32(x), _within_int32(dout)
    weight, bias = qkv_weight.contiguous(), None if qkv_bias is None else qkv_bias.contiguous()
    scale = (dim // num_heads) ** -0.5
    numbers = (scale, LOG2_E * scale, dropout_p)
    fixed = constants(tokens, dim, num_heads, bias is not None, dropout_p, x.dtype)
    strides = (*x.stride(), *dout.stride())

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs = min(batch, triton.cdiv(_multiprocessors(x.device) * PROGRAMS_PER_MULTIPROCESSOR, num_heads))
    dweight = x.new_empty(programs, 3 * dim, dim, dtype=torch.float32)
    dbias = x.new_empty(programs, 3 * dim, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_x_kernel[(batch,)](x, weight, bias, dout, dx, seed, *strides, *numbers, **fixed)
        backward_weight_kernel[(programs, num_heads)](
            x, weight, bias, dout, dweight, dbias, seed, *strides, batch, *numbers, **fixed
        )
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


@fused_attention_backward.register_fake
def _(dout: Tensor, x: Tensor, qkv_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, qkv_weight.new_empty(qkv_weight.shape), qkv_weight.new_empty(qkv_weight.shape[0])


def _within_int32(tokens: Tensor) -> Tensor:
    """The kernels count within a sample in 32 bits, which the strides of a huge transposed tensor would pass."""
    return tokens if tokens.numel() < 2**31 else tokens.contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qkv_weight, qkv_bias, ctx.num_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, qkv_weight, qkv_bias, seed)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, qkv_weight, qkv_bias, seed = ctx.saved_tensors
    dx, dweight, dbias = fused_attention_backward(
        dout, x, qkv_weight, qkv_bias, ctx.num_heads, ctx.dropout_p, seed
    )  # fmt: skip
    return dx, dweight, None if qkv_bias is None else dbias, None, None, None


fused_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastvit_kernels.fused_attention)
def _flops(x_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Of the definition: no padding counted."""
    batch, tokens, dim = x_shape
    return 2 * batch * tokens * dim * 3 * dim + 2 * 2 * batch * tokens * tokens * dim


@register_flop_formula(torch.ops.fastvit_kernels.fused_attention_backward)
def _flops_backward(dout_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Of the definition: what is recomputed is not counted."""
    return 2 * _flops(dout_shape)

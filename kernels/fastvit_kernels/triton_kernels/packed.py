"""Triton attention that reads the packed output of the QKV projection in place, and writes packed dQKV.

For models with more than 64 channels cuBLAS computes the projection. This kernel avoids the operations around it: the
permute, the copies that pad a head to 16 channels, and stacking three gradients.

Shape suffixes: B batch, N tokens, D dim, H heads, C channels of one head, M a block of query rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.packed_operator import packed_operator
from fastvit_kernels.triton_kernels.parts import (
    LOG2_E,
    cast,
    dot,
    dot_precision,
    dropout_factor,
    padded,
    softmax,
    softmax_backward,
)


class Tiles(NamedTuple):
    """The number of query rows in a block, and the number of warps per program."""

    block: int
    warps: int


def forward_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Chosen by the spills and times that fastvit_kernels.resources reports.

    Each warp has the 16 rows of a tensor core instruction; with fewer, several warps would compute the same products.
    """
    if dtype == torch.float32:
        return Tiles(16, 8)
    return Tiles(min(padded(tokens), 64), 4) if padded(tokens) <= 128 else Tiles(128, 8)


def backward_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Chosen like `forward_tiles`; here the gradients of all keys and values need registers too."""
    if dtype == torch.float32:
        return Tiles(16, 8)
    if padded(tokens) > 128:
        return Tiles(32, 8)
    return Tiles(min(padded(tokens), 64), 4 if padded(tokens) <= 64 else 8)


def constants(
    tokens: int, dim: int, num_heads: int, dropout_p: float, dtype: torch.dtype, tiles: Tiles
) -> dict[str, Any]:
    """Return the compile-time arguments and the number of warps of either kernel."""
    return {
        "N": tokens,
        "D": dim,
        "H": num_heads,
        "N_PAD": padded(tokens),
        "C_PAD": padded(dim // num_heads),
        "BLOCK": tiles.block,
        "DROPOUT": dropout_p > 0,
        "PRECISION": dot_precision(dtype),
        "num_warps": tiles.warps,
    }


@triton.jit
def _load_head(ptr, row_R, channel_C, row_stride, N: tl.constexpr, C: tl.constexpr):
    """Load rows of one head's query, key or value, padded with zeros."""
    exists_RC = (row_R < N)[:, None] & (channel_C < C)[None, :]
    return tl.load(ptr + row_R[:, None] * row_stride + channel_C[None, :], mask=exists_RC, other=0.0)


@triton.jit
def _store_head(ptr, value_RC, row_R, channel_C, row_stride, N: tl.constexpr, C: tl.constexpr):
    exists_RC = (row_R < N)[:, None] & (channel_C < C)[None, :]
    pointers_RC = ptr + row_R[:, None] * row_stride + channel_C[None, :]
    tl.store(pointers_RC, cast(value_RC, ptr.dtype.element_ty), mask=exists_RC)


@triton.jit
def forward_kernel(
    qkv_ptr, out_ptr, seed_ptr, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (sample, head) and block of query rows."""
    C: tl.constexpr = D // H
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    row_M = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_N = tl.arange(0, N_PAD)
    channel_C = tl.arange(0, C_PAD)
    query_ptr = qkv_ptr + sample * N * 3 * D + head * C
    q_MC = _load_head(query_ptr, row_M, channel_C, 3 * D, N, C)
    k_NC = _load_head(query_ptr + D, key_N, channel_C, 3 * D, N, C)
    v_NC = _load_head(query_ptr + 2 * D, key_N, channel_C, 3 * D, N, C)
    probs_MN = softmax(dot(q_MC, tl.trans(k_NC), PRECISION), key_N < N, scale_log2)
    if DROPOUT:
        probs_MN *= dropout_factor(tl.load(seed_ptr), sample * H + head, row_M, dropout_p, N_PAD)
    out_MC = dot(cast(probs_MN, v_NC.dtype), v_NC, PRECISION)
    _store_head(out_ptr + sample * N * D + head * C, out_MC, row_M, channel_C, D, N, C)


@triton.jit
def backward_kernel(
    qkv_ptr, dout_ptr, dqkv_ptr, seed_ptr, scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (sample, head); the gradients of key and value stay in registers over all blocks of queries."""
    C: tl.constexpr = D // H
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    key_N = tl.arange(0, N_PAD)
    channel_C = tl.arange(0, C_PAD)
    query_ptr = qkv_ptr + sample * N * 3 * D + head * C
    dquery_ptr = dqkv_ptr + sample * N * 3 * D + head * C
    k_NC = _load_head(query_ptr + D, key_N, channel_C, 3 * D, N, C)
    v_NC = _load_head(query_ptr + 2 * D, key_N, channel_C, 3 * D, N, C)
    dk_NC = tl.zeros((N_PAD, C_PAD), tl.float32)
    dv_NC = tl.zeros((N_PAD, C_PAD), tl.float32)
    for start in range(0, N, BLOCK):
        row_M = start + tl.arange(0, BLOCK)
        q_MC = _load_head(query_ptr, row_M, channel_C, 3 * D, N, C)
        dout_MC = _load_head(dout_ptr + sample * N * D + head * C, row_M, channel_C, D, N, C)
        probs_MN = softmax(dot(q_MC, tl.trans(k_NC), PRECISION), key_N < N, scale_log2)
        dprobs_MN = dot(dout_MC, tl.trans(v_NC), PRECISION)
        dropped_MN = probs_MN
        if DROPOUT:
            factor_MN = dropout_factor(tl.load(seed_ptr), sample * H + head, row_M, dropout_p, N_PAD)
            dropped_MN = probs_MN * factor_MN
            dprobs_MN *= factor_MN
        dv_NC += dot(tl.trans(cast(dropped_MN, dout_MC.dtype)), dout_MC, PRECISION)
        dscores_MN = cast(softmax_backward(probs_MN, dprobs_MN) * scale, q_MC.dtype)
        dk_NC += dot(tl.trans(dscores_MN), q_MC, PRECISION)
        _store_head(dquery_ptr, dot(dscores_MN, k_NC, PRECISION), row_M, channel_C, 3 * D, N, C)
    _store_head(dquery_ptr + D, dk_NC, key_N, channel_C, 3 * D, N, C)
    _store_head(dquery_ptr + 2 * D, dv_NC, key_N, channel_C, 3 * D, N, C)


def _forward(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Compute (batch, tokens, dim) from packed projections, (batch, tokens, 3*dim); `seed` is for dropout."""
    batch, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv = qkv.contiguous()
    out = qkv.new_empty(batch, tokens, dim)
    tiles = forward_tiles(tokens, qkv.dtype)
    grid = (batch * num_heads, triton.cdiv(tokens, tiles.block))
    scale_log2 = LOG2_E * (dim // num_heads) ** -0.5
    meta = constants(tokens, dim, num_heads, dropout_p, qkv.dtype, tiles)
    with torch.cuda.device_of(qkv):
        forward_kernel[grid](qkv, out, seed, scale_log2, dropout_p, **meta)
    return out


def _backward(dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Compute the gradient of the packed projections, (batch, tokens, 3*dim)."""
    batch, tokens, dim = dout.shape
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    scale = (dim // num_heads) ** -0.5
    meta = constants(tokens, dim, num_heads, dropout_p, qkv.dtype, backward_tiles(tokens, qkv.dtype))
    grid = (batch * num_heads,)
    with torch.cuda.device_of(qkv):
        backward_kernel[grid](qkv, dout, dqkv, seed, scale, LOG2_E * scale, dropout_p, **meta)
    return dqkv


packed_attention, packed_attention_backward = packed_operator("packed_attention", _forward, _backward)

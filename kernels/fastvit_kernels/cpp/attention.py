"""Attention for CPUs: a matrix product projects to packed query, key and value, and a C++ kernel computes the heads.

The kernel writes neither separate heads nor scores to memory; other implementations write and read them several times.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.cpp.library import cpp_library, pointer
from fastvit_kernels.packed_operator import packed_operator

MAX_HEAD_DIM = 128


def why_unsupported(x: Tensor, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not support tokens `x` and matrix products in `dtype`, or None if it does."""
    if x.device.type != "cpu":
        return f"cpp supports tensors on the CPU, got {x.device}; use fused"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"cpp supports float32, bfloat16 and float16, got {str(dtype).removeprefix('torch.')}; use fused"
    if x.shape[2] // num_heads > MAX_HEAD_DIM:
        return f"cpp supports heads of up to {MAX_HEAD_DIM} channels, got {x.shape[2] // num_heads}; use fused"
    return None


def cpp_attention(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float) -> Tensor:
    """See `fastvit_kernels.attention`; `why_unsupported` states the limits."""
    qkv = F.linear(x, qkv_weight, qkv_bias)
    head_dim = x.shape[2] // num_heads
    in_bfloat16 = qkv.dtype == torch.bfloat16 and head_dim % 2 == 0
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    attended = packed_attention(qkv if in_bfloat16 else qkv.float(), num_heads, dropout_p, seed)
    return attended.to(qkv.dtype)


class _Call(ctypes.Structure):
    """The struct `Call` of attention.cpp."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dropout_p", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("threads", ctypes.c_int),
    )


def _run(name: str, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None, *tensors: Tensor) -> None:
    batch, tokens, width = qkv.shape
    seed_bits = int(seed) & 0xFFFFFFFF if seed is not None else 0
    call = _Call(batch, tokens, num_heads, dropout_p, seed_bits, torch.get_num_threads())
    library = cpp_library(("heads.h", "attention.cpp"), qkv.dtype, HEAD_DIM=width // 3 // num_heads)
    getattr(library, name)(ctypes.byref(call), *map(pointer, (qkv, *tensors)))


def _forward(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Compute (batch, tokens, dim) from packed projections, (batch, tokens, 3*dim); `seed` is for dropout."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    _run("forward", qkv, num_heads, dropout_p, seed, out)
    return out


def _backward(dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Compute the gradient of the packed projections, (batch, tokens, 3*dim)."""
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    _run("backward", qkv, num_heads, dropout_p, seed, dout, dqkv)
    return dqkv


packed_attention, _ = packed_operator("cpp_attention", _forward, _backward)

"""Attention for CPUs by a kernel of our own in C++, on the packed projections that one product makes.

Nothing between the projections and the heads' outputs goes through memory: neither the heads one by one nor their
scores, which other implementations write and read several times.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.cpp_library import cpp_library, pointer
from fastvit_kernels.packed_operator import packed_operator

MAX_HEAD_DIM = 128


def refusal(x: Tensor, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernel can't serve tokens `x`, multiplied in `dtype`, or None where it can."""
    if x.device.type != "cpu":
        return f"cpp takes tensors on the CPU, got {x.device}; take fused"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"cpp takes float32, bfloat16 and float16, got {str(dtype).removeprefix('torch.')}; take fused"
    if x.shape[2] // num_heads > MAX_HEAD_DIM:
        return f"cpp takes heads of up to {MAX_HEAD_DIM} channels, got {x.shape[2] // num_heads}; take fused"
    return None


def cpp_attention(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float) -> Tensor:
    """See `fastvit_kernels.attention`; `refusal` says what it takes."""
    qkv = F.linear(x, qkv_weight, qkv_bias)
    head_dim = x.shape[2] // num_heads
    in_bfloat16 = qkv.dtype == torch.bfloat16 and head_dim % 2 == 0
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    attended = packed_attention(qkv if in_bfloat16 else qkv.float(), num_heads, dropout_p, seed)
    return attended.to(qkv.dtype)


class _Call(ctypes.Structure):
    """As in the source."""

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
    library = cpp_library("cpp_attention.cpp", qkv.dtype, HEAD_DIM=width // 3 // num_heads)
    getattr(library, name)(ctypes.byref(call), *map(pointer, (qkv, *tensors)))


def _forward(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Attention on packed projections, (batch, tokens, 3*dim), to (batch, tokens, dim); `seed` is for dropout."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    _run("forward", qkv, num_heads, dropout_p, seed, out)
    return out


def _backward(dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Gradient of the packed projections, (batch, tokens, 3*dim)."""
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    _run("backward", qkv, num_heads, dropout_p, seed, dout, dqkv)
    return dqkv


packed_attention, _ = packed_operator("cpp_attention", _forward, _backward)

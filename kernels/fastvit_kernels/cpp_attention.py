"""Attention for CPUs by a kernel of our own in C++, on the packed projections that one product makes.

Nothing between the projections and the heads' outputs goes through memory: neither the heads one by one nor their
scores, which other implementations write and read several times.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.cpp_library import cpp_library, pointer

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


@torch.library.custom_op("fastvit_kernels::cpp_attention", mutates_args=())
def packed_attention(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Attention on packed projections, (batch, tokens, 3*dim), to (batch, tokens, dim); `seed` is for dropout."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    _run("forward", qkv, num_heads, dropout_p, seed, out)
    return out


@packed_attention.register_fake
def _(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.custom_op("fastvit_kernels::cpp_attention_backward", mutates_args=())
def packed_attention_backward(
    dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Gradient of the packed projections, (batch, tokens, 3*dim)."""
    qkv, dout = qkv.contiguous(), dout.contiguous()
    dqkv = torch.empty_like(qkv)
    _run("backward", qkv, num_heads, dropout_p, seed, dout, dqkv)
    return dqkv


@packed_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, seed)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    qkv, seed = ctx.saved_tensors
    return packed_attention_backward(dout, qkv, ctx.num_heads, ctx.dropout_p, seed), None, None, None


packed_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastvit_kernels.cpp_attention)
def _flops(qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    batch, tokens, three_dim = qkv_shape
    return 2 * 2 * batch * tokens * tokens * (three_dim // 3)


@register_flop_formula(torch.ops.fastvit_kernels.cpp_attention_backward)
def _flops_backward(dout_shape: tuple[int, ...], qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(qkv_shape)

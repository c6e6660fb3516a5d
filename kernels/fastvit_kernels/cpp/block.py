"""A transformer block for CPUs as one C++ kernel each way.

A thread takes a few samples through the whole block while they lie in its cache. For the backward pass the kernel keeps
the packed projections, the attention's output and two numbers per token and head, and computes the rest again.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.cpp.library import addresses, cpp_library, pointer

PASSES = ("block_kernel/common.h", "block_kernel/forward.cpp", "block_kernel/backward.cpp")
SOURCES = ("heads.h", "matmul.h", "gelu.h", *PASSES)
MAX_DIM, MAX_TOKENS = 384, 256


def why_unsupported(tokens: int, dim: int, hidden: int, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not support a block of these sizes with matrix products in `dtype`, or None if it does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} (float32 and bfloat16 are supported)"
    if dim % 16 or hidden % 16:
        return f"embed_dim {dim} with MLPs of width {hidden} (multiples of 16 are supported)"
    if dim > MAX_DIM or tokens > MAX_TOKENS:
        return f"{tokens} tokens of {dim} channels (up to {MAX_TOKENS} of {MAX_DIM} are supported)"
    if dim // num_heads % 2:
        return f"heads of {dim // num_heads} channels (even numbers are supported)"
    return None


class _Call(ctypes.Structure):
    """The struct `Call` of block_kernel/common.h."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("eps1", ctypes.c_float),
        ("eps2", ctypes.c_float),
        ("dropout_p", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("threads", ctypes.c_int),
        ("attention_scale", ctypes.c_void_p),
        ("mlp_scale", ctypes.c_void_p),
    )


def _prepare(
    x: Tensor,
    parameters: Sequence[Tensor],
    scales: Sequence[Tensor],
    seed: Tensor | None,
    num_heads: int,
    exact_gelu: bool,
    residual_norm: bool,
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> tuple[ctypes.CDLL, Any, Any]:
    """Return the library for these sizes, and its first two arguments: the call and the parameters."""
    batch, tokens, dim = x.shape
    library = cpp_library(
        SOURCES,
        dtype,
        DIM=dim,
        HEAD_DIM=dim // num_heads,
        HIDDEN=parameters[8].shape[0],
        EXACT_GELU=int(exact_gelu),
        RESIDUAL_NORM=int(residual_norm),
    )
    seed_bits = int(seed) & 0xFFFFFFFF if seed is not None else 0
    call = _Call(batch, tokens, *numbers, seed_bits, torch.get_num_threads(), *addresses(scales or (None, None)))
    return library, ctypes.byref(call), addresses(parameters)


@torch.library.custom_op("fastvit_kernels::block", mutates_args=())
def block(
    x: Tensor,
    parameters: Sequence[Tensor],
    scales: Sequence[Tensor],
    seed: Tensor | None,
    num_heads: int,
    exact_gelu: bool,
    residual_norm: bool,
    numbers: Sequence[float],
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a block, see `fastvit_kernels.transformer_block`.

    Args:
        x: tokens, (batch, tokens, dim), float32.
        parameters: the twelve of a block, float32 and contiguous; qkv_bias is empty if there is none.
        scales: (batch,) for each branch, float32; or none.
        seed: for dropout of attention weights.
        num_heads, exact_gelu, residual_norm: the block's settings.
        numbers: eps of both norms, and the dropout probability of attention weights.
        dtype: of the matrix products, float32 or bfloat16.
        save: keep what the backward pass needs.

    Returns:
        The block's output, and what is kept: packed projections, attention's output and the statistics of its softmax;
        empty without `save`.
    """
    x = x.contiguous()
    out, *saved = _empty(x, num_heads, dtype, save)
    library, call, parts = _prepare(
        x, parameters, scales, seed, num_heads, exact_gelu, residual_norm, numbers, dtype
    )
    library.forward(call, parts, pointer(x), pointer(out), addresses(saved))
    return out, saved[0], saved[1], saved[2]


def _empty(x: Tensor, num_heads: int, dtype: torch.dtype, save: bool) -> tuple[Tensor, ...]:
    batch, tokens, dim = x.shape
    kept = batch if save else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(kept, tokens, 3 * dim, dtype=dtype),
        x.new_empty(kept, tokens, dim, dtype=dtype),
        x.new_empty(kept, num_heads, 2, tokens),
    )


@block.register_fake
def _(x: Tensor, parameters: Any, scales: Any, seed: Any, num_heads: int, *settings: Any) -> tuple[Tensor, ...]:
    *_, dtype, save = settings
    return _empty(x, num_heads, dtype, save)


@torch.library.custom_op("fastvit_kernels::block_backward", mutates_args=())
def block_backward(
    dout: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    scales: Sequence[Tensor],
    seed: Tensor | None,
    num_heads: int,
    exact_gelu: bool,
    residual_norm: bool,
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of all parameters one after the other in one tensor."""
    x, dout = x.contiguous(), dout.contiguous()
    dx, gradients = x.new_empty(x.shape), x.new_empty(_total(parameters))
    library, call, parts = _prepare(
        x, parameters, scales, seed, num_heads, exact_gelu, residual_norm, numbers, dtype
    )
    library.backward(call, parts, pointer(x), pointer(dout), addresses(saved), pointer(dx), pointer(gradients))
    return dx, gradients


def _sizes(parameters: Sequence[Tensor]) -> list[int]:
    """Numbers of elements; without a bias, the kernel's gradients have room for one all the same."""
    sizes = [parameter.numel() for parameter in parameters]
    sizes[3] = parameters[2].shape[0]
    return sizes


def _total(parameters: Sequence[Tensor]) -> int:
    return sum(_sizes(parameters))


@block_backward.register_fake
def _(
    dout: Tensor, saved: Sequence[Tensor], x: Tensor, parameters: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(_total(parameters))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, parameters, scales, seed, *ctx.settings, save = inputs
    if not save:
        raise RuntimeError("a block's gradient needs what its forward pass saves: call it with save=True")
    ctx.parts = len(parameters), len(scales)
    ctx.save_for_backward(x, seed, *parameters, *scales, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor, *unused: Tensor | None) -> tuple[Any, ...]:
    x, seed, *others = ctx.saved_tensors
    parts, scales_end = ctx.parts[0], sum(ctx.parts)
    parameters, scales, saved = others[:parts], others[parts:scales_end], others[scales_end:]
    dx, gradients = block_backward(dout, saved, x, parameters, scales, seed, *ctx.settings)
    pieces = [
        piece[: parameter.numel()].view(parameter.shape)
        for piece, parameter in zip(gradients.split(_sizes(parameters)), parameters, strict=True)
    ]
    return dx, pieces, [None] * len(scales), *[None] * 7


block.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x_shape: tuple[int, ...], parameters: Any, *settings: Any, **kwargs: Any) -> int:
    batch, tokens, dim = x_shape
    hidden = parameters[8][0]
    return 2 * batch * tokens * (4 * dim**2 + 2 * dim * hidden) + 4 * batch * tokens**2 * dim


def _flops_backward(
    dout_shape: Any, saved: Any, x_shape: tuple[int, ...], parameters: Any, *settings: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x_shape, parameters)


register_flop_formula(torch.ops.fastvit_kernels.block)(_flops)
register_flop_formula(torch.ops.fastvit_kernels.block_backward)(_flops_backward)

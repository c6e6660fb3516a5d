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
    parameters: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    seed: Tensor | None,
    num_heads: int,
    exact_gelu: bool,
    residual_norm: bool,
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> tuple[ctypes.CDLL, Any, Any]:
    """Return the library for these sizes, and its first two arguments: the call and the parameters."""
    batch, tokens, dim = x.shape
    fc1_weight = parameters[8]
    assert fc1_weight is not None
    library = cpp_library(
        SOURCES,
        dtype,
        DIM=dim,
        HEAD_DIM=dim // num_heads,
        HIDDEN=fc1_weight.shape[0],
        EXACT_GELU=int(exact_gelu),
        RESIDUAL_NORM=int(residual_norm),
    )
    seed_bits = int(seed) & 0xFFFFFFFF if seed is not None else 0
    call = _Call(batch, tokens, *numbers, seed_bits, torch.get_num_threads(), *addresses(scales))
    return library, ctypes.byref(call), addresses(parameters)


# The parameters are arguments of their own, because autograd takes longer for a list of tensors than for each of them.
@torch.library.custom_op("fastvit_kernels::block", mutates_args=())
def block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    attention_scale: Tensor | None,
    mlp_scale: Tensor | None,
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
        norm1_weight to fc2_bias: the parameters, float32 and contiguous.
        attention_scale, mlp_scale: the factors of each sample's branches, (batch,), float32.
        seed: for dropout of attention weights.
        num_heads, exact_gelu, residual_norm: the block's settings.
        numbers: eps of both norms, and the dropout probability of attention weights.
        dtype: of the matrix products, float32 or bfloat16.
        save: keep what the backward pass needs.

    Returns:
        The block's output, and what is kept: packed projections, attention's output and the statistics of its softmax;
        empty without `save`.
    """
    parameters = (
        norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    x = x.contiguous()
    out, *saved = _empty(x, num_heads, dtype, save)
    library, call, weights = _prepare(
        x, parameters, (attention_scale, mlp_scale), seed, num_heads, exact_gelu, residual_norm, numbers, dtype
    )
    library.forward(call, weights, pointer(x), pointer(out), addresses(saved))
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
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, num_heads, _gelu, _residual_norm, _numbers, dtype, save = arguments
    return _empty(x, num_heads, dtype, save)


@torch.library.custom_op("fastvit_kernels::block_backward", mutates_args=())
def block_backward(
    dout: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    parameters: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    seed: Tensor | None,
    num_heads: int,
    exact_gelu: bool,
    residual_norm: bool,
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the gradient of x, and those of the parameters; that of a bias which is None is empty."""
    x, dout = x.contiguous(), dout.contiguous()
    gradients = _empty_gradients(x, parameters)
    library, call, weights = _prepare(x, parameters, scales, seed, num_heads, exact_gelu, residual_norm, numbers, dtype)
    dx, *of_parameters = gradients
    library.backward(call, weights, pointer(x), pointer(dout), addresses(saved), pointer(dx), addresses(of_parameters))
    return gradients


def _empty_gradients(x: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0 if tensor is None else tensor.shape) for tensor in (x, *parameters)]


@block_backward.register_fake
def _(
    dout: Tensor, saved: Sequence[Tensor], x: Tensor, parameters: Sequence[Tensor | None], *settings: Any
) -> list[Tensor]:
    return _empty_gradients(x, parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, num_heads, exact_gelu, residual_norm, numbers, dtype, save = inputs
    if not save:
        raise RuntimeError("a block's gradient needs what its forward pass saves: call it with save=True")
    ctx.settings = num_heads, exact_gelu, residual_norm, numbers, dtype
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor, *unused: Tensor | None) -> tuple[Any, ...]:
    x, *parameters, attention_scale, mlp_scale, seed, qkv, attended, softmax = ctx.saved_tensors
    gradients = block_backward(
        dout,
        [qkv, attended, softmax],
        x,
        parameters,
        [attention_scale, mlp_scale],
        seed,
        *ctx.settings,
    )
    by_input = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
    return *by_input, *[None] * 9


block.register_autograd(_autograd, setup_context=_setup_context)


def _flops(x_shape: tuple[int, ...], *arguments: Any, **kwargs: Any) -> int:
    batch, tokens, dim = x_shape
    hidden = arguments[8][0]
    return 2 * batch * tokens * (4 * dim**2 + 2 * dim * hidden) + 4 * batch * tokens**2 * dim


def _flops_backward(
    dout_shape: Any, saved: Any, x_shape: tuple[int, ...], parameters: Any, *settings: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x_shape, *parameters)


register_flop_formula(torch.ops.fastvit_kernels.block)(_flops)
register_flop_formula(torch.ops.fastvit_kernels.block_backward)(_flops_backward)

"""QKV projection and attention in one Triton kernel, for models of up to 64 channels.

Each program handles a whole sample: it reads x once and writes neither QKV nor the scores to device memory, forward or
backward. The backward pass recomputes them in two kernels, one for the gradient of x and one for those of the weights.
A single kernel would read x and dout once less, but its accumulators would leave registers for only one program per
multiprocessor, and several are needed to hide the latency of these chains of small products. The gradients of weight
and bias stay in registers over all samples of a program. Each program writes them to its own row, and torch adds up the
rows. Neither kernel uses atomic operations, so the result is deterministic.

The backward pass takes three launches. With a kernel that writes packed dQKV it would recompute once instead of twice,
but take five launches or more (that kernel, two products by cuBLAS, the sum for the bias, and conversions of the
weight) and move 16 tensors of tokens instead of 5. kernels/README.md compares the machine code; nothing was timed.

The kernels are in fused_kernels.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.triton_kernels.fused_kernels import backward_weight_kernel, backward_x_kernel, forward_kernel
from fastvit_kernels.triton_kernels.parts import (
    LOG2_E,
    dot_precision,
    multiprocessors,
    padded,
    weight_gradient_groups,
)

MAX_DIM = 64


def fits(tokens: int, dim: int, num_heads: int, dtype: torch.dtype) -> bool:
    """Whether a sample's tokens, a head and its scores fit into the registers and shared memory of one program."""
    max_tokens, max_head_dim = (64, 16) if dtype == torch.float32 else (128, 32)
    return dim <= MAX_DIM and padded(tokens) <= max_tokens and padded(dim // num_heads) <= max_head_dim


def constants(
    tokens: int, dim: int, num_heads: int, has_bias: bool, dropout_p: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the compile-time arguments and the number of warps of all three kernels."""
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
        "num_warps": 8 if padded(tokens) > 64 or dtype == torch.float32 else 4,
    }


@torch.library.custom_op("fastvit_kernels::projected_attention", mutates_args=())
def fused_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """See `fastvit_kernels.attention`; `seed`, (1,) int64, seeds dropout.

    Products are computed in x's dtype. The weight and the bias may have another one, such as float32 under autocast:
    the kernels convert them, which saves launches.
    """
    batch, tokens, dim = x.shape
    x = _within_int32(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale_log2 = LOG2_E * (dim // num_heads) ** -0.5
    meta = constants(tokens, dim, num_heads, qkv_bias is not None, dropout_p, x.dtype)
    bias = None if qkv_bias is None else qkv_bias.contiguous()
    with torch.cuda.device_of(x):
        forward_kernel[(batch,)](
            x, qkv_weight.contiguous(), bias, out, seed, *x.stride(), scale_log2, dropout_p, **meta
        )  # fmt: skip
    return out


@fused_attention.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastvit_kernels::projected_attention_backward", mutates_args=())
def fused_attention_backward(
    dout: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x, and that of the weight and the bias, one after the other in a flat tensor."""
    batch, tokens, dim = x.shape
    x, dout = _within_int32(x), _within_int32(dout)
    weight, bias = qkv_weight.contiguous(), None if qkv_bias is None else qkv_bias.contiguous()
    scale = (dim // num_heads) ** -0.5
    scalars = (scale, LOG2_E * scale, dropout_p)
    meta = constants(tokens, dim, num_heads, bias is not None, dropout_p, x.dtype)
    strides = (*x.stride(), *dout.stride())

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    groups = weight_gradient_groups(batch, num_heads, multiprocessors(x.device))
    dparameters = x.new_empty(groups, _numel(weight, bias), dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_x_kernel[(batch,)](x, weight, bias, dout, dx, seed, *strides, *scalars, **meta)
        backward_weight_kernel[(groups, num_heads)](
            x, weight, bias, dout, dparameters, seed, *strides, batch, *scalars, **meta
        )
    return dx, dparameters.sum(0).to(weight.dtype)


@fused_attention_backward.register_fake
def _(dout: Tensor, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, qkv_weight.new_empty(_numel(qkv_weight, qkv_bias))


def _numel(weight: Tensor, bias: Tensor | None) -> int:
    return weight.numel() + (0 if bias is None else bias.numel())


def _within_int32(tokens: Tensor) -> Tensor:
    """Copy huge tensors to be contiguous: the kernels compute offsets within a sample in 32 bits."""
    return tokens if tokens.numel() < 2**31 else tokens.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qkv_weight, qkv_bias, ctx.num_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, qkv_weight, qkv_bias, seed)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, qkv_weight, qkv_bias, seed = ctx.saved_tensors
    dx, dparameters = fused_attention_backward(dout, x, qkv_weight, qkv_bias, ctx.num_heads, ctx.dropout_p, seed)
    dweight = dparameters[: qkv_weight.numel()].view(qkv_weight.shape)
    dbias = None if qkv_bias is None else dparameters[qkv_weight.numel() :]
    return dx, dweight, dbias, None, None, None


fused_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastvit_kernels.projected_attention)
def _flops(x_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """FLOPs by the definition, without padding."""
    batch, tokens, dim = x_shape
    return 2 * batch * tokens * dim * 3 * dim + 2 * 2 * batch * tokens * tokens * dim


@register_flop_formula(torch.ops.fastvit_kernels.projected_attention_backward)
def _flops_backward(dout_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """FLOPs by the definition, without recomputation."""
    return 2 * _flops(dout_shape)

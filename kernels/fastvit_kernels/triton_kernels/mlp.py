"""x + MLP(LayerNorm(x)) in one Triton kernel, for models of up to 64 channels.

Each program handles a block of tokens: it reads x once and writes only the result; the hidden units never reach device
memory. The backward pass recomputes them from x in two kernels, one for the gradient of x and one for those of the
parameters, for the reasons given in fused.py. Neither uses atomic operations, so the result is deterministic. All
kernels read the parameters in their own dtype, so that autocast needs no kernels to convert them and their gradients.

The kernels are in mlp_kernels.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.triton_kernels.mlp_kernels import backward_weight_kernel, backward_x_kernel, forward_kernel
from fastvit_kernels.triton_kernels.parts import dot_precision, multiprocessors, padded, weight_gradient_groups

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FORWARD_TOKENS, BACKWARD_TOKENS, FLOAT32_TOKENS = 64, 32, 16
"""tokens in a block, chosen for the registers and spills that fastvit_kernels.resources reports"""
HIDDEN_UNITS = 32
"""hidden units in a block, chosen likewise"""


def constants(dim: int, hidden: int, gelu: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Return the compile-time arguments and the launch options of a kernel; `tokens` is FORWARD_ or BACKWARD_TOKENS."""
    return {
        "D": dim,
        "D_PAD": padded(dim),
        "HIDDEN": hidden,
        "BLOCK_M": FLOAT32_TOKENS if dtype == torch.float32 else tokens,
        "BLOCK_H": min(HIDDEN_UNITS, padded(hidden)),
        "TANH": gelu == "tanh",
        "DTYPE": DTYPES[dtype],
        "PRECISION": dot_precision(dtype),
        "num_warps": 4,
        "num_stages": 1,
    }


@torch.library.custom_op("fastvit_kernels::residual_mlp", mutates_args=())
def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    gelu: str,
    dtype: torch.dtype,
) -> Tensor:
    """See `fastvit_kernels.residual_mlp`; matrix products are computed in `dtype`."""
    hidden, dim = fc1_weight.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // dim
    meta = constants(dim, hidden, gelu, dtype, FORWARD_TOKENS)
    parameters = _contiguous(norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, meta["BLOCK_M"]),)](x, *parameters, out, rows, eps, **meta)
    return out


@residual_mlp.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastvit_kernels::residual_mlp_backward", mutates_args=())
def residual_mlp_backward(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float,
    gelu: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, of the linear layers' parameters and of the norm's.

    The latter two are float32, one after the other in a single dimension, so that one kernel sums each over programs.
    """
    hidden, dim = fc1_weight.shape
    x, dout = x.contiguous(), dout.contiguous()
    rows = x.numel() // dim
    arguments = (x, *_contiguous(norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight), dout)
    dx = torch.empty_like(x)
    meta = constants(dim, hidden, gelu, dtype, BACKWARD_TOKENS)
    token_blocks, blocks = triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(hidden, meta["BLOCK_H"])
    groups = weight_gradient_groups(token_blocks, blocks, multiprocessors(x.device))
    dlinear = x.new_empty(groups, sum(_linear_sizes(dim, hidden)), dtype=torch.float32)
    dnorm = x.new_empty(groups * blocks, 2 * dim, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_x_kernel[(token_blocks,)](*arguments, dx, rows, eps, **meta)
        backward_weight_kernel[(groups, blocks)](*arguments, dlinear, dnorm, rows, eps, **meta)
    return dx, dlinear.sum(0), dnorm.sum(0)


@residual_mlp_backward.register_fake
def _(
    dout: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, dim = fc1_weight.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dlinear = x.new_empty(sum(_linear_sizes(dim, hidden)), dtype=torch.float32)
    return dx, dlinear, x.new_empty(2 * dim, dtype=torch.float32)


def _contiguous(*parameters: Tensor) -> list[Tensor]:
    return [parameter.contiguous() for parameter in parameters]


def _linear_sizes(dim: int, hidden: int) -> tuple[int, int, int, int]:
    """Return the numbers of elements of fc1's weight, fc2's weight, fc1's bias and fc2's bias."""
    return hidden * dim, dim * hidden, hidden, dim


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.gelu, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = ctx.saved_tensors
    dx, dlinear, dnorm = residual_mlp_backward(
        dout, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, ctx.eps, ctx.gelu, ctx.dtype
    )
    hidden, dim = fc1_weight.shape
    dfc1_weight, dfc2_weight, dfc1_bias, dfc2_bias = dlinear.split(_linear_sizes(dim, hidden))
    dnorm_weight, dnorm_bias = dnorm.split(dim)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    gradients = (dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias)
    pairs = zip(gradients, parameters, strict=True)
    return dx, *(each.view(parameter.shape).to(parameter.dtype) for each, parameter in pairs), None, None, None


residual_mlp.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastvit_kernels.residual_mlp)
def _flops(
    x_shape: tuple[int, ...], norm: Any, norm_bias: Any, fc1_shape: tuple[int, int], *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the matrix products by the definition, without padding."""
    hidden, dim = fc1_shape
    return 2 * 2 * (torch.Size(x_shape).numel() // dim) * dim * hidden


@register_flop_formula(torch.ops.fastvit_kernels.residual_mlp_backward)
def _flops_backward(dout_shape: tuple[int, ...], *shapes: Any, **kwargs: Any) -> int:
    """FLOPs by the definition, without recomputation."""
    return 2 * _flops(*shapes)

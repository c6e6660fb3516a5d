"""Register kernels for attention on packed projections as a torch operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def packed_operator(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]
) -> tuple[CustomOpDef, CustomOpDef]:
    """Register `fastvit_kernels::NAME` with its gradient, its fake implementation for tracing and its FLOP formula.

    Args:
        name: name of the operator; its gradient is called NAME_backward.
        forward: maps qkv (batch, tokens, 3*dim), num_heads, dropout_p and a seed or None to (batch, tokens, dim).
        backward: maps the output's gradient and the same arguments to qkv's gradient.

    Returns:
        The operator, and the operator of its gradient.
    """
    operator = torch.library.custom_op(f"fastvit_kernels::{name}", forward, mutates_args=())
    gradient = torch.library.custom_op(f"fastvit_kernels::{name}_backward", backward, mutates_args=())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, ctx.num_heads, ctx.dropout_p, seed = inputs
        ctx.save_for_backward(qkv, seed)

    def autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, seed = ctx.saved_tensors
        return gradient(dout, qkv, ctx.num_heads, ctx.dropout_p, seed), None, None, None

    def flops(qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
        batch, tokens, three_dim = qkv_shape
        return 2 * 2 * batch * tokens * tokens * (three_dim // 3)

    def flops_backward(dout_shape: tuple[int, ...], qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
        return 2 * flops(qkv_shape)

    operator.register_fake(_fake)
    gradient.register_fake(_fake_backward)
    operator.register_autograd(autograd, setup_context=setup_context)
    register_flop_formula(getattr(torch.ops.fastvit_kernels, name))(flops)
    register_flop_formula(getattr(torch.ops.fastvit_kernels, f"{name}_backward"))(flops_backward)
    return operator, gradient


def _fake(qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _fake_backward(dout: Tensor, qkv: Tensor, num_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)

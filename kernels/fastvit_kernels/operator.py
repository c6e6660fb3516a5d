"""The operator: check the arguments, then call the implementation of the given name."""

import torch
from torch import Tensor

from fastvit_kernels.autotune import Mode, auto_name
from fastvit_kernels.fused import probabilities, split_heads
from fastvit_kernels.registry import AUTO, IMPLEMENTATIONS, check_implementation


def attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    dropout_p: float = 0.0,
    implementation: str = AUTO,
) -> Tensor:
    """Compute multi-head self-attention without the output projection (Vaswani et al. 2017, eq. 1, per head).

    Args:
        x: tokens, (batch, tokens, dim), floating point.
        qkv_weight: (3*dim, dim), query rows first, then key, then value; within each, head after head.
        qkv_bias: (3*dim,) or None.
        num_heads: number of heads; must divide dim. Scores are scaled by 1/sqrt(dim / num_heads).
        dropout_p: probability with which an attention weight is zeroed; 0 outside training.
        implementation: a name from `implementations()`; "auto" times them on the first call with a new shape,
            unless they were timed on this machine before, and prints the result in one line to standard error (see
            `choose`).

    Returns:
        (batch, tokens, dim), the heads' outputs concatenated, in x's dtype (under autocast, in autocast's).

    Raises:
        ValueError: if the implementation is unknown, cannot run here or does not support this shape, or if the
            arguments do not match each other.
    """
    check_implementation(implementation)
    _check_arguments(x, qkv_weight, qkv_bias, num_heads, dropout_p)
    if implementation == AUTO and not x.numel():
        implementation = "fused"  # an empty tensor cannot be timed
    if implementation == AUTO:
        mode: Mode = "traced" if torch.compiler.is_compiling() else "eager"
        implementation = auto_name(
            tuple(x.shape), num_heads, x.dtype, x.device, qkv_weight.dtype, qkv_bias is not None, dropout_p, mode
        )
    entry = IMPLEMENTATIONS[implementation]
    reason = entry.why_unsupported(x, num_heads)
    if reason:
        raise ValueError(reason)
    return entry.function(x, qkv_weight, qkv_bias, num_heads, dropout_p)


def attention_weights(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int) -> Tensor:
    """Compute the attention probabilities, (batch, heads, tokens, tokens); row i has the weights of token i.

    This is for inspection: the fast implementations never hold all probabilities in memory. Arguments and errors are
    those of `attention`.
    """
    _check_arguments(x, qkv_weight, qkv_bias, num_heads, 0.0)
    q_BHNC, k_BHNC, _ = split_heads(x, qkv_weight, qkv_bias, num_heads)
    return probabilities(q_BHNC, k_BHNC)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, dropout_p: float) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, tokens, dim), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if not x.shape[1]:
        raise ValueError(f"x must have at least one token, got shape {tuple(x.shape)}")
    dim = x.shape[-1]
    if weight.shape != (3 * dim, dim):
        raise ValueError(f"qkv_weight must be (3*dim, dim) = {(3 * dim, dim)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (3 * dim,):
        raise ValueError(f"qkv_bias must be (3*dim,) = {(3 * dim,)} or None, got {tuple(bias.shape)}")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim: got {num_heads} heads for dim {dim}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    for name, tensor in (("qkv_weight", weight), ("qkv_bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; both must be on one device")
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}; outside autocast they must be equal")

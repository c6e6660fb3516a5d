"""The operator: check the arguments, then call the implementation of the given name."""

import torch
from torch import Tensor

from fastvit_kernels.arguments import check_attention
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
    check_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p)
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
    check_attention(x, qkv_weight, qkv_bias, num_heads, 0.0)
    q_BHNC, k_BHNC, _ = split_heads(x, qkv_weight, qkv_bias, num_heads)
    return probabilities(q_BHNC, k_BHNC)

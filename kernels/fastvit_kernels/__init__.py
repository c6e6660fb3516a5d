"""Self-attention over short sequences, one operator with interchangeable implementations.

Every implementation computes the same function of the same, merged parameters (Vaswani et al. 2017, eq. 1,
per head), so swapping one for another never touches a checkpoint.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvit_kernels.fused import fused_attention
from fastvit_kernels.naive import naive_attention
from fastvit_kernels.sdpa import sdpa_attention

__all__ = ["DEFAULT", "attention", "check_implementation", "implementations"]

_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None, int, float], Tensor]] = {
    "naive": naive_attention,
    "fused": fused_attention,
    "sdpa": sdpa_attention,
}
DEFAULT = "fused"


def implementations() -> dict[str, str | None]:
    """The implementations by name; the value is None where it can run here, else the reason why not."""
    return dict.fromkeys(_IMPLEMENTATIONS)


def check_implementation(name: str) -> None:
    """Raise ValueError, listing what there is, unless `name` is an implementation that can run here."""
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {name!r}; allowed: {', '.join(_IMPLEMENTATIONS)}")


def attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    dropout_p: float = 0.0,
    implementation: str = DEFAULT,
) -> Tensor:
    """Multi-head self-attention, before the output projection.

    Args:
        x: tokens, (batch, tokens, dim), floating point.
        qkv_weight: (3*dim, dim), query rows first, then key, then value; within each, head after head.
        qkv_bias: (3*dim,) or None.
        num_heads: heads; must divide dim. Scores are scaled by 1/sqrt(dim / num_heads).
        dropout_p: probability with which an attention weight is zeroed; 0 outside training.
        implementation: a name from `implementations()`.

    Returns:
        (batch, tokens, dim), the heads' outputs concatenated, in x's dtype (under autocast, in autocast's).

    Raises:
        ValueError: for an unknown implementation or arguments that don't fit together.
    """
    check_implementation(implementation)
    _check_arguments(x, qkv_weight, qkv_bias, num_heads, dropout_p)
    return _IMPLEMENTATIONS[implementation](x, qkv_weight, qkv_bias, num_heads, dropout_p)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, dropout_p: float) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, tokens, dim), got shape {tuple(x.shape)}")
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

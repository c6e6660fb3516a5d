"""A whole pre-norm transformer block as one operator: attention, MLP, their norms and residual connections."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.arguments import check_attention, check_gelu, check_parameters
from fastvit_kernels.cpp import block as cpp
from fastvit_kernels.cpp.library import why_unavailable
from fastvit_kernels.operator import attention
from fastvit_kernels.registry import compute_dtype

BLOCKS = ("torch", "cpp")
"""the implementations: composed from operators, and our CPU kernel"""


class BlockParameters(NamedTuple):
    """The parameters of a block; shapes as in nn.LayerNorm and nn.Linear, (out_features, in_features)."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class BlockSettings(NamedTuple):
    """What a block computes with its parameters."""

    num_heads: int
    """must divide dim"""
    eps1: float = 1e-5
    """added to the variance in the first LayerNorm"""
    eps2: float = 1e-5
    """added to the variance in the second LayerNorm"""
    gelu: str = "tanh"
    """"tanh" or "none" (exact), as in torch.nn.GELU"""
    residual_norm: bool = False
    """apply the second LayerNorm to the residual stream itself (compact family)"""
    dropout_p: float = 0.0
    """probability with which an attention weight is zeroed; 0 outside training"""


def transformer_block(
    x: Tensor,
    parameters: BlockParameters,
    settings: BlockSettings,
    scales: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
    *,
    implementation: str = "torch",
) -> Tensor:
    """Compute y = x + a proj(attention(norm1(x))), and then y + b fc2(GELU(fc1(norm2(y)))).

    With `residual_norm` the last step is norm2(y) + b fc2(GELU(fc1(norm2(y)))).

    Args:
        x: tokens, (batch, tokens, dim), floating point.
        parameters: the block's parameters.
        settings: what to compute.
        scales: the factors a and b of each sample's branches, (batch,) each, for stochastic depth; None for 1. `cpp`
            does not compute their gradients.
        seed: selects the attention weights that `cpp` drops, (1,), int64, see `draw_seed`; by default drawn anew.
        implementation: "torch" or "cpp".

    Returns:
        A tensor of x's shape and dtype. Under autocast the matrix products are computed in autocast's dtype.

    Raises:
        ValueError: if the implementation is unknown, cannot run here or does not support the block, or if the arguments
            do not match each other.
    """
    check_block(implementation)
    _check_arguments(x, parameters, settings, scales)
    if implementation == "torch":
        return _composed(x, parameters, settings, scales)
    if reason := why_block_unsupported(x, parameters.fc1_weight.shape[0], settings.num_heads):
        raise ValueError(f"cpp does not support {reason}; use torch")
    if scales is not None and any(scale.requires_grad for scale in scales):
        raise ValueError("cpp does not support scales that require a gradient; use torch")
    if seed is None and settings.dropout_p:
        seed = draw_seed()
    out, *_ = cpp.block(
        x.float(),
        *(None if tensor is None else tensor.float().contiguous() for tensor in parameters),
        *((None, None) if scales is None else (scale.float().contiguous() for scale in scales)),
        seed,
        settings.num_heads,
        settings.gelu == "none",
        settings.residual_norm,
        [settings.eps1, settings.eps2, settings.dropout_p],
        compute_dtype(x),
        torch.is_grad_enabled(),
    )
    return out.to(x.dtype)


def _check_arguments(
    x: Tensor, parameters: BlockParameters, settings: BlockSettings, scales: tuple[Tensor, Tensor] | None
) -> None:
    p = parameters
    check_attention(x, p.qkv_weight, p.qkv_bias, settings.num_heads, settings.dropout_p)
    check_gelu(settings.gelu)
    dim, hidden = x.shape[-1], p.fc1_weight.shape[0]
    check_parameters(
        x,
        {
            "norm1_weight": (p.norm1_weight, (dim,)),
            "norm1_bias": (p.norm1_bias, (dim,)),
            "proj_weight": (p.proj_weight, (dim, dim)),
            "proj_bias": (p.proj_bias, (dim,)),
            "norm2_weight": (p.norm2_weight, (dim,)),
            "norm2_bias": (p.norm2_bias, (dim,)),
            "fc1_weight": (p.fc1_weight, (hidden, dim)),
            "fc1_bias": (p.fc1_bias, (hidden,)),
            "fc2_weight": (p.fc2_weight, (dim, hidden)),
            "fc2_bias": (p.fc2_bias, (dim,)),
        },
    )
    for scale in scales or ():
        if scale.shape != x.shape[:1]:
            raise ValueError(f"scales must be (batch,) = {tuple(x.shape[:1])}, got {tuple(scale.shape)}")
        if scale.device != x.device:
            raise ValueError(f"scales are on {scale.device}, x on {x.device}; both must be on one device")


def draw_seed() -> Tensor:
    """Draw a seed for dropout on the CPU, (1,), int64."""
    return torch.randint(2**62, (1,))


def _composed(
    x: Tensor, parameters: BlockParameters, settings: BlockSettings, scales: tuple[Tensor, Tensor] | None
) -> Tensor:
    p, dim = parameters, x.shape[-1:]
    attention_scale, mlp_scale = (1.0, 1.0) if scales is None else (scale[:, None, None] for scale in scales)
    normed = F.layer_norm(x, dim, p.norm1_weight, p.norm1_bias, settings.eps1)
    heads = attention(
        normed, p.qkv_weight, p.qkv_bias, settings.num_heads, dropout_p=settings.dropout_p, implementation="fused"
    )
    y = x + attention_scale * F.linear(heads, p.proj_weight, p.proj_bias)
    normed = F.layer_norm(y, dim, p.norm2_weight, p.norm2_bias, settings.eps2)
    active = F.gelu(F.linear(normed, p.fc1_weight, p.fc1_bias), approximate=settings.gelu)
    branch = F.linear(active, p.fc2_weight, p.fc2_bias)
    return ((normed if settings.residual_norm else y) + mlp_scale * branch).to(x.dtype)


def why_block_unsupported(x: Tensor, hidden_dim: int, num_heads: int) -> str | None:
    """Why the CPU kernel does not support tokens `x` in a block with an MLP of this width, or None if it does."""
    if x.device.type != "cpu":
        return f"tensors on {x.device}"
    if _exporting():
        return "torch.export, since an exported program must run where this package is not installed"
    return cpp.why_unsupported(x.shape[1], x.shape[2], hidden_dim, num_heads, compute_dtype(x))


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """Whether torch.export traces. torch.compile calls this function instead of tracing it.

    In traced code `is_exporting` is true under torch.compile too, up to torch 2.11.
    """
    return torch.compiler.is_exporting()


def check_block(name: str) -> None:
    """Raise ValueError unless `name` is an implementation of the block that can run here."""
    if reason := _why_invalid(name):
        raise ValueError(reason)


@torch.compiler.assume_constant_result
def _why_invalid(name: str) -> str | None:
    if name not in BLOCKS:
        return f"unknown block implementation {name!r}; allowed: {', '.join(BLOCKS)}"
    reason = why_unavailable() if name == "cpp" else None
    return reason and f"block implementation {name!r} {reason}; available here: torch"

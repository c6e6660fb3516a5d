"""The second half of a transformer's block as one operator: LayerNorm, MLP and the residual connection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.arguments import check_gelu, check_parameters
from fastvit_kernels.registry import IMPLEMENTATIONS, compute_dtype, triton_interpreted

MLPS = ("torch", "triton")
"""the implementations: torch's operators, and our GPU kernels"""
MAX_MLP_DIM = 64
"""number of channels up to which `triton` computes an MLP"""


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-5,
    gelu: str = "tanh",
    implementation: str = "torch",
) -> Tensor:
    """Compute x + fc2(GELU(fc1(LayerNorm(x)))).

    Args:
        x: tokens, (..., dim), floating point.
        norm_weight, norm_bias: of the LayerNorm, (dim,).
        fc1_weight, fc1_bias: of the first linear layer, (hidden, dim) and (hidden,).
        fc2_weight, fc2_bias: of the second linear layer, (dim, hidden) and (dim,).
        eps: added to the variance in the LayerNorm.
        gelu: "tanh" or "none" (exact), as in torch.nn.GELU.
        implementation: "torch" or "triton".

    Returns:
        A tensor of x's shape and dtype. Under autocast the matrix products are computed in autocast's dtype.

    Raises:
        ValueError: if the implementation is unknown, cannot run here or does not support x, or if the arguments do not
            match each other.
    """
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_mlp(implementation)
    _check_arguments(x, parameters, gelu)
    if implementation == "torch":
        hidden = F.linear(F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
        return (x + F.linear(F.gelu(hidden, approximate=gelu), fc2_weight, fc2_bias)).to(x.dtype)
    dtype = compute_dtype(x)
    if reason := _why_triton_unsupported(x, dtype):
        raise ValueError(reason)
    from fastvit_kernels.triton_kernels import mlp  # triton may not be installed

    out: Tensor = mlp.residual_mlp(x, *parameters, eps, gelu, dtype)
    return out


def _why_triton_unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    if x.device.type != "cuda" and not triton_interpreted():
        return f"triton supports tensors on a GPU, got {x.device}; use torch"
    if x.shape[-1] > MAX_MLP_DIM:
        return f"triton supports MLPs of up to {MAX_MLP_DIM} channels, got {x.shape[-1]}; use torch for wider ones"
    from fastvit_kernels.triton_kernels.parts import DTYPES  # triton may not be installed

    for each in (x.dtype, dtype):
        if each not in DTYPES:
            names = ", ".join(str(allowed).removeprefix("torch.") for allowed in DTYPES)
            return f"triton supports {names}, got {each}; use torch"
    return None


def check_mlp(name: str) -> None:
    """Raise ValueError unless `name` is an implementation of the MLP that can run here."""
    reason = _why_invalid(name)
    if reason:
        raise ValueError(reason)


@torch.compiler.assume_constant_result
def _why_invalid(name: str) -> str | None:
    if name not in MLPS:
        return f"unknown MLP implementation {name!r}; allowed: {', '.join(MLPS)}"
    reason = IMPLEMENTATIONS[name].why_unavailable() if name == "triton" else None
    return reason and f"MLP implementation {name!r} {reason}; available here: torch"


def _check_arguments(x: Tensor, parameters: tuple[Tensor, ...], gelu: str) -> None:
    check_gelu(gelu)
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"x must be (..., dim) and floating point, got shape {tuple(x.shape)} and {x.dtype}")
    dim, hidden = x.shape[-1], parameters[2].shape[0]
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    shapes: tuple[tuple[int, ...], ...] = ((dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,))
    check_parameters(x, {name: (p, shape) for name, p, shape in zip(names, parameters, shapes, strict=True)})

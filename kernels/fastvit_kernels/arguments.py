"""Checks of the operators' arguments: each raises ValueError, and says what is allowed."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_attention(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, dropout_p: float) -> None:
    """Check the arguments of `attention`."""
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
        if tensor is not None:
            _check_parameter(name, tensor, x)


def check_gelu(gelu: str) -> None:
    """Check the form of the GELU."""
    if gelu not in ("tanh", "none"):
        raise ValueError(f"gelu must be tanh or none, got {gelu!r}")


def check_parameters(x: Tensor, parameters: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Check parameters by name, each with the shape that it must have, and whether they match the tokens `x`."""
    for name, (parameter, shape) in parameters.items():
        if parameter.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(parameter.shape)}")
        _check_parameter(name, parameter, x)


def _check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.device != x.device:
        raise ValueError(f"{name} is on {parameter.device}, x on {x.device}; both must be on one device")
    if parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} is {parameter.dtype}, x is {x.dtype}; outside autocast they must be equal")

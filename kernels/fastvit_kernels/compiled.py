"""torch.compile of `fused`: one graph for the forward and one for the backward pass, per shape, dtype and device."""

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

from fastvit_kernels.fused import fused_attention


def compiled_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`. Compiling for a new shape, dtype or device takes seconds."""
    if torch.compiler.is_compiling():  # the surrounding graph includes this function
        return fused_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p)
    tensors = tuple(
        None if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in (x, qkv_weight, qkv_bias)
    )
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    function = _compiled_for(tensors, num_heads, dropout_p, torch.is_grad_enabled(), autocast)
    return function(x, qkv_weight, qkv_bias, num_heads, dropout_p)


@functools.cache
def _compiled_for(*signature: object) -> Callable[..., Tensor]:
    return compile_copy(fused_attention)


def compile_copy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a copy of `function` that has its own code object.

    torch.compile counts recompilations per code object and stops compiling after eight. A model with several shapes,
    trained and evaluated, exceeds that. torch.compile's argument `recompile_limit` would be plainer, but torch 2.9, the
    oldest supported version, does not have it.
    """
    code = function.__code__.replace(co_name=f"compiled_{function.__name__}")
    copy = types.FunctionType(code, function.__globals__)
    return torch.compile(copy, fullgraph=True, dynamic=False)

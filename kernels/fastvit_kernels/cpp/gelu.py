"""GELU followed by a linear layer, with a C++ kernel for CPUs.

torch's tanh takes four times as long as our exponential. The layer saves only GELU's input for the backward pass, where
one pass over it computes GELU's gradient and recomputes its value, which the weight's gradient needs.

Source: Hendrycks & Gimpel 2016 (https://arxiv.org/abs/1606.08415), with tanh written as a sigmoid.
"""

import ctypes
import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvit_kernels.cpp.library import cpp_library, pointer, why_unavailable
from fastvit_kernels.registry import compute_dtype

SOURCES = ("gelu.h", "gelu.cpp")


class GELULinear(nn.Linear):
    """GELU followed by a linear layer: (..., in_features) to (..., out_features).

    On a CPU with a C++ compiler, float32 and bfloat16 use our kernel. Other devices and dtypes use torch's operators.
    torch.export does too, because an exported program must run where this package is not installed.

    Args:
        in_features: as in nn.Linear, which also names and initialises the parameters.
        out_features: as in nn.Linear.
        approximate: "tanh" or "none", as in nn.GELU; the kernel supports only "tanh".
        drop: dropout probability between GELU and the linear layer; the kernel supports only 0.
    """

    def __init__(self, in_features: int, out_features: int, approximate: str = "none", drop: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.approximate = approximate
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        supported = self.approximate == "tanh" and not self.drop and x.device.type == "cpu"
        if supported and _has_kernel(dtype):
            bias = None if self.bias is None else self.bias.to(dtype)
            return _GELULinear.apply(x.to(dtype), self.weight.to(dtype), bias)
        active = F.gelu(x, approximate=self.approximate)
        return F.linear(F.dropout(active, self.drop, self.training), self.weight, self.bias)


@torch.compiler.assume_constant_result
def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether the kernel computes in this dtype here. torch.compile calls this function instead of tracing it.

    In traced code `is_exporting` is true under torch.compile too, up to torch 2.11.
    """
    if torch.compiler.is_exporting() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return why_unavailable() is None and _compile_error(dtype) is None


@functools.cache
def _compile_error(dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be compiled, with a warning the first time, or None if it can."""
    try:
        cpp_library(SOURCES, dtype, EXACT_GELU=0)
    except ValueError as error:
        warnings.warn(f"GELU uses torch's operators, which are slower: {error}", stacklevel=4)
        return str(error)
    return None


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, active = gelu_backward(dout @ weight, x)
        dout_RO, active_RI = dout.reshape(-1, dout.shape[-1]), active.view(-1, active.shape[-1])
        return dx, dout_RO.mT @ active_RI, dout_RO.sum(0) if ctx.has_bias else None


def _run(name: str, x: Tensor, *tensors: Tensor) -> None:
    words = -(-x.numel() * x.element_size() // 4)
    library = cpp_library(SOURCES, x.dtype, EXACT_GELU=0)
    getattr(library, name)(ctypes.c_int64(words), torch.get_num_threads(), *map(pointer, (x, *tensors)))


@torch.library.custom_op("fastvit_kernels::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """Tanh-approximated GELU of each element of a float32 or bfloat16 tensor on the CPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _run("forward", x, out)
    return out


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastvit_kernels::gelu_backward", mutates_args=())
def gelu_backward(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of `gelu`'s argument, and `gelu` of the argument."""
    dout, x = dout.contiguous(), x.contiguous()
    dx, out = torch.empty_like(x), torch.empty_like(x)
    _run("backward", x, dout, dx, out)
    return dx, out


@gelu_backward.register_fake
def _(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)

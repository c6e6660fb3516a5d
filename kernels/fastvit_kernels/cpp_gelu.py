"""GELU with the linear layer behind it, for a CPU by a kernel of our own.

torch's tanh takes four times as long as our exponential; and the layer keeps GELU's argument alone for the backward
pass, where one walk over it makes GELU's gradient and, again, its value, which is what the weight's gradient needs.

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

from fastvit_kernels.cpp_library import cpp_library, pointer, unavailable
from fastvit_kernels.registry import compute_dtype

SOURCE = "cpp_gelu.cpp"


class GELULinear(nn.Linear):
    """A linear layer of its input's GELU; faster on a CPU with a C++ compiler, elsewhere and in other dtypes the same.

    torch.export sees torch's own operators: what it writes is to run where this package isn't.

    Args:
        in_features, out_features: as of nn.Linear, which also names and initialises the parameters.
        approximate: "tanh" or "none", as of nn.GELU; only "tanh" has the kernel.
        drop: dropout between the two; only 0 has the kernel.
    """

    def __init__(self, in_features: int, out_features: int, approximate: str = "none", drop: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.approximate = approximate
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        fits = self.approximate == "tanh" and not self.drop and x.device.type == "cpu"
        if fits and not torch.compiler.is_exporting() and _serves(dtype):
            bias = None if self.bias is None else self.bias.to(dtype)
            return _GELULinear.apply(x.to(dtype), self.weight.to(dtype), bias)
        active = F.gelu(x, approximate=self.approximate)
        return F.linear(F.dropout(active, self.drop, self.training), self.weight, self.bias)


@torch.compiler.assume_constant_result
def _serves(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and unavailable() is None and _problem(dtype) is None


@functools.cache
def _problem(dtype: torch.dtype) -> str | None:
    """Why the kernel can't be compiled, or None; warns of it, once."""
    try:
        cpp_library(SOURCE, dtype)
    except ValueError as error:
        warnings.warn(f"GELU is torch's own here, slower: {error}", stacklevel=4)
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
    library = cpp_library(SOURCE, x.dtype)
    getattr(library, name)(ctypes.c_int64(words), torch.get_num_threads(), *map(pointer, (x, *tensors)))


@torch.library.custom_op("fastvit_kernels::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """GELU of each element of a float32 or bfloat16 tensor on the CPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _run("forward", x, out)
    return out


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastvit_kernels::gelu_backward", mutates_args=())
def gelu_backward(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `gelu`'s argument, and `gelu` of it."""
    dout, x = dout.contiguous(), x.contiguous()
    dx, out = torch.empty_like(x), torch.empty_like(x)
    _run("backward", x, dout, dx, out)
    return dx, out


@gelu_backward.register_fake
def _(dout: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)

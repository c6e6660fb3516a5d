"""GELU in its tanh form, for a CPU by a kernel of our own: torch's tanh takes four times as long as our exponential.

Source: Hendrycks & Gimpel 2016 (https://arxiv.org/abs/1606.08415), with tanh written as a sigmoid.
"""

import ctypes
import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.cpp_library import cpp_library, pointer, unavailable

SOURCE = "cpp_gelu.cpp"


class TanhGELU(nn.Module):
    """`nn.GELU(approximate="tanh")`, faster on a CPU with a C++ compiler; elsewhere and in other dtypes the same."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _compiles(x.dtype):
            return gelu(x)
        return F.gelu(x, approximate="tanh")


@torch.compiler.assume_constant_result
def _compiles(dtype: torch.dtype) -> bool:
    return unavailable() is None and _problem(dtype) is None


@functools.cache
def _problem(dtype: torch.dtype) -> str | None:
    """Why the kernel can't be compiled, or None; warns of it, once."""
    try:
        cpp_library(SOURCE, dtype)
    except ValueError as error:
        warnings.warn(f"GELU is torch's own here, slower: {error}", stacklevel=4)
        return str(error)
    return None


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
def gelu_backward(dout: Tensor, x: Tensor) -> Tensor:
    """Gradient of `gelu`'s argument."""
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _run("backward", x, dout, dx)
    return dx


@gelu_backward.register_fake
def _(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return gelu_backward(dout, x)


gelu.register_autograd(_backward, setup_context=_setup_context)

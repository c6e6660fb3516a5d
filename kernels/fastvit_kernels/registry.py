"""The implementations by name, and whether each can run on this machine."""

import importlib.util
import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.compiled import compiled_attention
from fastvit_kernels.cpp import attention as cpp
from fastvit_kernels.cpp import library as cpp_library
from fastvit_kernels.fused import fused_attention
from fastvit_kernels.naive import naive_attention
from fastvit_kernels.sdpa import sdpa_attention

AUTO = "auto"
"""the name that selects an implementation by measurement"""
COMPILING = ("compiled", "cpp", "triton")
"""implementations whose first call with a new shape takes a second or more"""
MIN_CAPABILITY = (7, 5)
"""CUDA compute capability that the Triton kernels need: Turing, the oldest that torch's wheels support"""


class Implementation(NamedTuple):
    """One way to compute the operator, and its limits."""

    function: Callable[[Tensor, Tensor, Tensor | None, int, float], Tensor]
    """takes x, qkv_weight, qkv_bias, num_heads, dropout_p"""
    why_unavailable: Callable[[], str | None] = lambda: None
    """returns why it cannot run on this machine, or None if it can"""
    why_unsupported: Callable[[Tensor, int], str | None] = lambda x, num_heads: None
    """returns why it does not support tokens x with this number of heads, or None if it does"""


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU: slow, for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton; it comes with torch on Linux; elsewhere, pip install triton"
    if triton_interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a GPU; with TRITON_INTERPRET=1 it runs on the CPU, slowly, for tests"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "needs a GPU of compute capability 7.5 (Turing) or newer"
    return None


def _why_cpp_unsupported(x: Tensor, num_heads: int) -> str | None:
    return cpp.why_unsupported(x, num_heads, compute_dtype(x))


def _why_triton_unsupported(x: Tensor, num_heads: int) -> str | None:
    from fastvit_kernels.triton_kernels.attention import why_unsupported  # triton may not be installed

    if x.device.type != "cuda" and not triton_interpreted():
        return f"triton supports tensors on a GPU, got {x.device}; use fused"
    return why_unsupported(x, num_heads, compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if it is enabled, otherwise that of x."""
    kind = x.device.type
    if kind == "meta":  # autocast does not know the meta device
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _triton_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    from fastvit_kernels.triton_kernels.attention import triton_attention

    return triton_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p)


# `auto` prefers the later of two that are equally fast.
IMPLEMENTATIONS = {
    "naive": Implementation(naive_attention),
    "fused": Implementation(fused_attention),
    "sdpa": Implementation(sdpa_attention),
    "compiled": Implementation(compiled_attention, cpp_library.why_without_compiler),
    "cpp": Implementation(cpp.cpp_attention, cpp_library.why_unavailable, _why_cpp_unsupported),
    "triton": Implementation(_triton_attention, _why_triton_unavailable, _why_triton_unsupported),
}


def implementations() -> dict[str, str | None]:
    """Map the name of each implementation to the reason why it cannot run here, or to None if it can."""
    return {name: entry.why_unavailable() for name, entry in IMPLEMENTATIONS.items()} | {AUTO: None}


def why_unsupported(name: str, device: torch.device) -> str | None:
    """Why an implementation is not meant for a device, or None if it is; Triton's interpreter is for tests only."""
    if name == "triton" and (device.type != "cuda" or triton_interpreted()):
        return "triton needs a GPU"
    if name == "cpp" and device.type != "cpu":
        return "cpp needs a CPU"
    return None


def candidates(device: torch.device) -> list[str]:
    """Return the names of the implementations that can run here and are meant for `device`."""
    names = [name for name, reason in implementations().items() if reason is None and name != AUTO]
    return [name for name in names if why_unsupported(name, device) is None]


def check_implementation(name: str) -> None:
    """Raise ValueError, listing the implementations, unless `name` is one that can run here."""
    reason = _why_invalid(name)
    if reason:
        raise ValueError(reason)


@torch.compiler.assume_constant_result
def _why_invalid(name: str) -> str | None:
    if name != AUTO and name not in IMPLEMENTATIONS:
        names = [*IMPLEMENTATIONS, AUTO]
        close = get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown attention implementation {name!r}{hint}; allowed: {', '.join(names)}"
    reason = None if name == AUTO else IMPLEMENTATIONS[name].why_unavailable()
    if reason is None:
        return None
    available = [other for other, why_not in implementations().items() if why_not is None]
    return f"attention implementation {name!r} {reason}; available here: {', '.join(available)}"

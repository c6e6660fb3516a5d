"""The implementations by name, and whether each can run here."""

import importlib.util
import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels import cpp_attention, cpp_library
from fastvit_kernels.compiled import compiled_attention
from fastvit_kernels.fused import fused_attention
from fastvit_kernels.naive import naive_attention
from fastvit_kernels.sdpa import sdpa_attention

AUTO = "auto"
"""the name of the measured choice"""
COMPILING = ("compiled", "cpp", "triton")
"""implementations whose first call with a new shape takes a second or more"""
MIN_CAPABILITY = (8, 0)


class Implementation(NamedTuple):
    """One way to compute the operator, and what it can't do."""

    function: Callable[[Tensor, Tensor, Tensor | None, int, float], Tensor]
    """of x, qkv_weight, qkv_bias, num_heads, dropout_p"""
    unavailable: Callable[[], str | None] = lambda: None
    """why it can't run on this machine, or None"""
    refusal: Callable[[Tensor, int], str | None] = lambda x, num_heads: None
    """why it can't serve these tokens with so many heads, or None"""


def triton_interpreted() -> bool:
    """True where Triton's kernels run in its interpreter: on the CPU, slowly, to be checked."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton; it comes with torch for Linux, or pip install triton"
    if triton_interpreted():
        return None
    if not torch.cuda.is_available():
        return "needs a GPU; with TRITON_INTERPRET=1 it runs on the CPU, slowly, to be checked"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _cpp_refusal(x: Tensor, num_heads: int) -> str | None:
    return cpp_attention.refusal(x, num_heads, compute_dtype(x))


def _triton_refusal(x: Tensor, num_heads: int) -> str | None:
    from fastvit_kernels.triton_attention import refusal  # not everyone has triton

    if x.device.type != "cuda" and not triton_interpreted():
        return f"triton takes tensors on a GPU, got {x.device}; take fused"
    return refusal(x, num_heads, compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrices are multiplied in: autocast's where it is on, else x's own."""
    kind = x.device.type
    if kind == "meta":  # which autocast knows nothing of
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _triton_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    from fastvit_kernels.triton_attention import triton_attention

    return triton_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p)


IMPLEMENTATIONS = {
    "naive": Implementation(naive_attention),
    "fused": Implementation(fused_attention),
    "sdpa": Implementation(sdpa_attention),
    "compiled": Implementation(compiled_attention, cpp_library.unavailable),
    "cpp": Implementation(cpp_attention.cpp_attention, cpp_library.unavailable, _cpp_refusal),
    "triton": Implementation(_triton_attention, _triton_unavailable, _triton_refusal),
}


def implementations() -> dict[str, str | None]:
    """The implementations by name; the value is None where it can run here, else the reason why not."""
    return {name: entry.unavailable() for name, entry in IMPLEMENTATIONS.items()} | {AUTO: None}


def unsuited(name: str, device: torch.device) -> str | None:
    """Why an implementation has no business being timed on a device, or None."""
    if name == "triton" and (device.type != "cuda" or triton_interpreted()):
        return "triton needs a GPU"
    if name == "cpp" and device.type != "cpu":
        return "cpp is for CPUs"
    return None


def check_implementation(name: str) -> None:
    """Raise ValueError, listing what there is, unless `name` is an implementation that can run here."""
    problem = _problem(name)
    if problem:
        raise ValueError(problem)


@torch.compiler.assume_constant_result
def _problem(name: str) -> str | None:
    if name != AUTO and name not in IMPLEMENTATIONS:
        names = [*IMPLEMENTATIONS, AUTO]
        close = get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown attention implementation {name!r}{hint}; allowed: {', '.join(names)}"
    reason = None if name == AUTO else IMPLEMENTATIONS[name].unavailable()
    if reason is None:
        return None
    can = [other for other, why_not in implementations().items() if why_not is None]
    return f"attention implementation {name!r} {reason}; here there are: {', '.join(can)}"

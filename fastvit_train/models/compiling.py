"""torch.compile for training."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

import fastvit_kernels
from fastvit_train.utils.errors import UserError

T = TypeVar("T")


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot work on `device`, because this machine has no C++ compiler.

    On a GPU torch.compile writes Triton kernels instead.
    """
    reason = fastvit_kernels.implementations()["compiled"]
    if reason is not None and device.type == "cpu":
        raise UserError(f"torch.compile {reason}; or leave out --compile and the launch's dynamo backend")


def compile_model(model: nn.Module, device: torch.device, graphed: bool = False) -> None:
    """Compile the whole `model` in place, so that no part of it is run by the Python interpreter.

    The names in the state dict do not change. All shapes are compiled as static.

    Args:
        model: on any device.
        device: the device that it is going to run on.
        graphed: launch its kernels as a CUDA graph. Each pass then overwrites the outputs and gradients of the previous
            pass, so use this only with one forward pass per optimizer step, in one process.
    """
    model.compile(dynamic=False, options=_options(device, graphed))


def compile_function(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """Return the compiled `function`; all shapes are compiled as static."""
    return torch.compile(function, dynamic=False, options=_options(device))


def _options(device: torch.device, graphed: bool = False) -> dict[str, Any] | None:
    """On a GPU, compute small operators together in one kernel, such as the conversions of all weights to bfloat16."""
    return {"combo_kernels": True, "triton.cudagraphs": graphed} if device.type == "cuda" else None

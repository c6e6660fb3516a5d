"""torch.compile for training."""

import torch
from torch import nn

import fastvit_kernels
from fastvit_train.utils.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot work on `device`, because this machine has no C++ compiler.

    On a GPU torch.compile writes Triton kernels instead.
    """
    reason = fastvit_kernels.implementations()["compiled"]
    if reason is not None and device.type == "cpu":
        raise UserError(f"torch.compile {reason}; or leave out --compile and the launch's dynamo backend")


def compile_model(model: nn.Module, graphed: bool) -> None:
    """Compile the whole `model` in place, so that no part of it is run by the Python interpreter.

    The names in the state dict do not change. All shapes are compiled as static.

    Args:
        model: on any device.
        graphed: launch its kernels as a CUDA graph. Each pass then overwrites the outputs and gradients of the previous
            pass, so use this only with one forward pass per optimizer step, in one process.
    """
    model.compile(dynamic=False, mode="reduce-overhead" if graphed else None)

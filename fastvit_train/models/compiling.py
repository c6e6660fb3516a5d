"""torch.compile for training."""

from torch import nn


def compile_model(model: nn.Module, graphed: bool) -> None:
    """Compile the whole `model` in place, so that no part of it is run by the Python interpreter.

    The names in the state dict do not change. All shapes are compiled as static.

    Args:
        model: on any device.
        graphed: launch its kernels as a CUDA graph. Each pass then overwrites the outputs and gradients of the previous
            pass, so use this only with one forward pass per optimizer step, in one process.
    """
    model.compile(dynamic=False, mode="reduce-overhead" if graphed else None)

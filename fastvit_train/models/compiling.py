"""torch.compile for training."""

from torch import nn


def compile_model(model: nn.Module, graphed: bool) -> None:
    """Compile `model` in place, whole, so that nothing between its blocks is left to the interpreter either.

    Names in the state dict stay as they are. Shapes are compiled as they come, none as a variable.

    Args:
        model: on any device.
        graphed: launch its kernels as a CUDA graph. What a pass returns, gradients included, lies where the next one
            writes: for one forward pass per optimizer step, in one process.
    """
    model.compile(dynamic=False, mode="reduce-overhead" if graphed else None)

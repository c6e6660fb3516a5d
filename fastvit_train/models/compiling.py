"""torch.compile for training."""

from torch import nn


def compile_model(model: nn.Module) -> None:
    """Compile `model` in place, whole, so that nothing between its blocks is left to the interpreter either.

    Names in the state dict stay as they are. Shapes are compiled as they come, none as a variable.
    """
    model.compile(dynamic=False)

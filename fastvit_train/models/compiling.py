"""torch.compile for training."""

from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block of `model` in place, or the whole model where it has no `blocks`.

    Blocks of one kind share their compiled code, so compiling takes no longer for more of them; names in the state
    dict stay as they are. Shapes are compiled as they come, none as a variable.
    """
    blocks = getattr(model, "blocks", None)
    for module in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else [model]:
        module.compile(dynamic=False)

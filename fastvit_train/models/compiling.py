"""torch.compile for training."""

from torch import nn

from fastvit_train.models.vit import ViT


def compile_model(model: nn.Module) -> None:
    """Compile `model` in place, whole, so that nothing between its blocks is left to the interpreter either.

    Names in the state dict stay as they are. Shapes are compiled as they come, none as a variable. Ours must compile
    to one graph; timm's may break theirs.
    """
    model.compile(dynamic=False, fullgraph=isinstance(model, ViT))

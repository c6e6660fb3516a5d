"""The layers of a model in the order of the forward pass: freeze the first ones, or train them more slowly."""

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit_train.utils.errors import UserError


def check_layers(model: nn.Module, flag: str) -> None:
    """Raise UserError, which names `flag`, unless timm can group the parameters of `model` into layers."""
    if not hasattr(model, "group_matcher"):
        raise UserError(f"{type(model).__name__} does not support {flag}; omit it, or choose another --model")


def freeze_first(model: nn.Module, layers: int) -> None:
    """Exclude the parameters of the first `layers` layers from training.

    The first layer turns the image into tokens, each block is one more, and the classifier is the last.

    Raises:
        UserError: if the model does not know its layers, if no layer but the classifier would be left, or if a frozen
            layer has batch normalization, whose statistics would still change.
    """
    check_layers(model, f"--freeze {layers}")
    numbers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    classifier = max(numbers.values())
    if layers > classifier:
        raise UserError(
            f"--freeze {layers} leaves nothing to train; allowed: at most {classifier}, which is all but the classifier"
        )
    frozen = {name for name, number in numbers.items() if number < layers}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.weight" in frozen:
            raise UserError(
                f"--freeze {layers} is not available for {type(model).__name__}: the statistics of its batch "
                "normalization would still change; omit it, or choose another --model"
            )
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)

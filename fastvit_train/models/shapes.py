"""The output shapes of a model, part by part."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_train.config.resolved import InputSize


@dataclass(frozen=True)
class Stage:
    """A part of a model with parameters."""

    name: str
    shape: tuple[int, ...]
    """shape of its output for one image"""
    parameters: int


def stages(model: nn.Module, input_size: InputSize) -> list[Stage]:
    """Return the parts of `model` in the order in which the forward pass calls them; containers are expanded one level.

    Args:
        model: on any device, including torch's meta device; it is not changed.
        input_size: channels, height and width of the input.
    """
    probe = copy.deepcopy(model).eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    parts = dict(_parts(probe))
    for name, part in parts.items():
        part.register_forward_hook(record(name))
    with torch.no_grad():
        probe(torch.zeros(1, *input_size, device=next(probe.parameters()).device))
    result = [Stage(name, shape, _count(parts[name])) for name, shape in shapes.items()]
    return [stage for stage in result if stage.parameters]


def tokens(passed: list[Stage]) -> int | None:
    """Return the largest number of tokens of an image, including a class token; None for a model without tokens."""
    return max((stage.shape[0] for stage in passed if len(stage.shape) == 2), default=None)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Implementations of attention to choose from, good and bad."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit_kernels import registry
from fastvit_kernels.autotune import choice as choice_module
from fastvit_kernels.autotune import measurement
from fastvit_kernels.fused import fused_attention
from fastvit_kernels.registry import Implementation

CASE = {"dtype": torch.float32, "device": torch.device("cpu")}


def slow(*arguments: object) -> Tensor:
    time.sleep(0.02)
    return fused_attention(*arguments)


def wrong(*arguments: object) -> Tensor:
    return fused_attention(*arguments) * 1.01


def wrong_in_the_backward_pass(*arguments: object) -> Tensor:
    output = fused_attention(*arguments)
    return output.detach() + 0.9 * (output - output.detach())


def broken(*arguments: object) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def only(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Tensor]) -> None:
    """Replace the implementations, and time them for a short while."""
    monkeypatch.setattr(measurement, "MAX_SECONDS", 0.1)
    replace_table(
        monkeypatch, {"fused": Implementation(fused_attention)} | {n: Implementation(f) for n, f in functions.items()}
    )


def replace_table(monkeypatch: pytest.MonkeyPatch, table: dict[str, Implementation]) -> None:
    for module in (registry, choice_module, measurement):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)

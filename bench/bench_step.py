"""A whole training step: forward, loss, backward and optimizer, on a batch that lies on the device."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_attention import unavailable
from bench.case import CALLS, DTYPES, Case, Work, assert_close, device
from fastvit_train.config.schema import OptimConfig
from fastvit_train.models import compile_model, pretrained_cfg
from fastvit_train.profiling.roofline import count_flops
from fastvit_train.training.optimizer import build_optimizer

MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"c_vit_4_4_32": (256,), "mc_vit_4_4_32": (256,), "cvt_7_4_32": (32,), "cct_7_3x1_32": (32,)},
    "cuda": {"c_vit_4_4_32": (256, 4096), "mc_vit_4_4_32": (256, 4096), "cvt_7_4_32": (256,), "cct_7_3x1_32": (256,)},
}
"""with the batches of a step"""
EAGER = ("naive", "fused", "sdpa", "compiled", "cpp", "triton")
COMPILED = ("naive", "fused", "sdpa", "cpp", "triton")
WHAT = "training step"


class Training:
    """A model with its optimizer and a batch to train on, the same for every row.

    Args:
        name: of the model.
        implementation: of its attention.
        compiled: compile it.
        dtype: "fp32", or "bf16" under autocast.
        batch: images.
        settings: of the model.
    """

    def __init__(self, name: str, implementation: str, compiled: bool, dtype: str, batch: int, **settings: Any) -> None:
        draws = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = timm.create_model(name, attention=implementation, **settings).to(device())
        self.dtype = dtype
        self.optimizer = build_optimizer(self.model, OptimConfig())
        size = pretrained_cfg(self.model)["input_size"][-1]
        self.images_BCHW = torch.randn(batch, 3, size, size, generator=draws).to(device())
        self.labels_B = torch.randint(0, 10, (batch,), generator=draws).to(device())
        if compiled:
            compile_model(self.model, graphed=device().type == "cuda")

    def precision(self) -> torch.autocast:
        """What forward passes run under."""
        return torch.autocast(device().type, torch.bfloat16, enabled=self.dtype == "bf16")

    def loss(self) -> Tensor:
        """Forward pass and loss."""
        with self.precision():
            logits = self.model(self.images_BCHW)
        return F.cross_entropy(logits.float(), self.labels_B)

    def step(self) -> Tensor:
        """One training step; returns the loss."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        """What a step computes, all gradients in one tensor; without dropout, so that it can be compared."""
        dropouts = (getattr(m, "attn_drop", 0) or (isinstance(m, nn.Dropout) and m.p) for m in self.model.modules())
        self.model.train(not any(dropouts))
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        self.model.train()
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@lru_cache(maxsize=1)  # the rows of a group follow each other
def reference(name: str, batch: int, settings: tuple[tuple[str, Any], ...]) -> tuple[Tensor, Tensor]:
    """The loss and the gradients that every row's first step should have."""
    return Training(name, "naive", False, "fp32", batch, **dict(settings)).loss_and_gradients()


def build(name: str, implementation: str, compiled: bool, dtype: str, batch: int, **settings: Any) -> Work:
    training = Training(name, implementation, compiled, dtype, batch, **settings)
    start = copy.deepcopy(training.model.state_dict())

    def check() -> None:
        training.model.load_state_dict(start)
        loss, gradients = training.loss_and_gradients()
        right_loss, right_gradients = reference(name, batch, tuple(settings.items()))
        assert_close(loss, right_loss, dtype, f"{implementation}'s loss")
        assert_close(gradients, right_gradients, dtype, f"{implementation}'s gradients")
        for _ in range(3):
            training.step()
        assert training.loss().item() < loss.item(), "three steps on one batch did not lower its loss"

    flops = batch * count_flops(Training(name, "fused", False, "fp32", 1, **settings).step)
    parameters = tuple(training.model.parameters())
    return Work(training.step, check, batch, flops, parameters, calls=CALLS[device().type])


def cases() -> Iterator[Case]:
    sizes = [(name, batch) for name, batches in MODELS[device().type].items() for batch in batches]
    rows = [(name, False) for name in EAGER] + [(name, True) for name in COMPILED]
    for (name, batch), dtype, (implementation, compiled) in product(sizes, DTYPES, rows):
        yield Case(
            WHAT,
            f"{name} B{batch}",
            dtype,
            f"{implementation}, model compiled" if compiled else implementation,
            batch,
            partial(build, name, implementation, compiled, dtype),
            unavailable(implementation),
            slow_check=compiled or implementation == "compiled",
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_step(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

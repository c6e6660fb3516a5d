"""Muon's kernel against the singular value decomposition, in float64; without a GPU in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit_kernels.triton_kernels.muon as triton_muon
from fastvit_kernels.muon import can_update, update_matrices

QUINTIC = (3.4445, -4.7750, 2.0315)
MERGED = {1: [(48, 48), (192, 48), (48, 200), (8, 3, 3, 3)], 3: [(144, 48), (48, 5)]}
"""shapes of weights by the number of matrices that are stacked in each"""


def draw(merged: int, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, gradients and averages."""
    weights, gradients, averages = ([torch.randn(s, device=device) for s in MERGED[merged]] for _ in range(3))
    return weights, gradients, averages


def update(tensors: tuple[list[Tensor], list[Tensor], list[Tensor]], lr: float | Tensor, **settings: Any) -> None:
    defaults: dict[str, Any] = {"merged": 1, "nesterov": True, "grad_scale": None, "found_inf": None}
    constants: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.9, "quintic": QUINTIC, "steps": 5}
    update_matrices(*tensors, lr, **{**constants, **defaults, **settings})


def expected(
    weight: Tensor, gradient: Tensor, average: Tensor, lr: float, merged: int, nesterov: bool
) -> tuple[Tensor, Tensor]:
    """Weight and average after the step, by what the iteration does to each singular value."""
    weight, gradient, average = (tensor.double().cpu() for tensor in (weight, gradient, average))
    average = 0.9 * average + 0.1 * gradient
    ahead = 0.1 * gradient + 0.9 * average if nesterov else average
    updates = []
    for part in ahead.flatten(1).chunk(merged):
        u, values, vh = torch.linalg.svd(part, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = sum(factor * values**power for factor, power in zip(QUINTIC, (1, 3, 5), strict=True))
        updates.append(0.2 * max(part.shape) ** 0.5 * u @ values.diag() @ vh)
    return weight * (1 - 0.1 * lr) - lr * torch.cat(updates).view(weight.shape), average


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("merged", MERGED)
def test_matrices_of_all_shapes_are_updated(seed: int, triton_device: str, merged: int, nesterov: bool) -> None:
    tensors = draw(merged, triton_device)
    results = [expected(*each, 0.5, merged, nesterov) for each in zip(*tensors, strict=True)]
    update(tensors, 0.5, merged=merged, nesterov=nesterov)
    for weight, average, (new_weight, new_average) in zip(tensors[0], tensors[2], results, strict=True):
        assert torch.allclose(average.double().cpu(), new_average, rtol=0, atol=1e-6)
        assert torch.allclose(weight.double().cpu(), new_weight, rtol=0, atol=1e-4)


def test_learning_rate_and_scale_may_be_on_the_device(seed: int, triton_device: str) -> None:
    by_value, by_tensor = draw(1, triton_device), draw(1, triton_device)
    for ours, theirs in zip(by_tensor, by_value, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(other)
    for gradient in by_tensor[1]:
        gradient *= 1024
    scale, zero = (torch.tensor(value, device=triton_device) for value in (1024.0, 0.0))
    update(by_value, 0.5)
    update(by_tensor, torch.tensor(0.5, device=triton_device), grad_scale=scale, found_inf=zero)
    for one, other in zip(by_tensor[0] + by_tensor[2], by_value[0] + by_value[2], strict=True):
        assert torch.equal(one, other)


def test_nothing_changes_after_an_overflow(seed: int, triton_device: str) -> None:
    tensors = draw(1, triton_device)
    tensors[1][0][0, 0] = torch.inf
    before = [tensor.clone() for tensor in tensors[0] + tensors[2]]
    one = torch.ones((), device=triton_device)
    update(tensors, 0.5, grad_scale=one, found_inf=one)
    assert all(torch.equal(a, b) for a, b in zip(tensors[0] + tensors[2], before, strict=True))


def test_more_matrices_than_a_launch_takes(seed: int, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(1, triton_device)
    results = [expected(*each, 0.5, 1, True) for each in zip(*tensors, strict=True)]
    monkeypatch.setattr(triton_muon, "MAX_PARAMETERS", 3)
    update(tensors, 0.5)
    for weight, (new_weight, _) in zip(tensors[0], results, strict=True):
        assert torch.allclose(weight.double().cpu(), new_weight, rtol=0, atol=1e-4)


def test_what_the_kernel_supports() -> None:
    assert triton_muon.fits(torch.zeros(64, 1000), 1) and triton_muon.fits(torch.zeros(192, 65), 3)
    assert not triton_muon.fits(torch.zeros(192, 65), 1)  # its square would not fit into the registers
    assert not triton_muon.fits(torch.zeros(48, 48, dtype=torch.bfloat16), 1)
    assert not triton_muon.fits(torch.zeros(48, 96).mT, 1)
    assert not can_update(torch.zeros(48, 48), 1)  # on the CPU, where torch's operators are faster

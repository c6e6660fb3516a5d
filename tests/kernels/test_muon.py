"""Muon's kernels against the singular value decomposition, in float64; without a GPU, Triton's in its interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit_kernels.cpp.muon as cpp_muon
import fastvit_kernels.triton_kernels.muon as triton_muon
from fastvit_kernels.muon import MuonStep, can_update, fits

QUINTIC = (3.4445, -4.7750, 2.0315)
MERGED = {1: [(48, 48), (192, 48), (48, 200), (8, 3, 3, 3)], 3: [(144, 48), (48, 5)]}
"""shapes of weights by the number of matrices that are stacked in each"""


Update = Callable[[list[Tensor], list[Tensor], list[Tensor], MuonStep], None]


@pytest.fixture(params=["cpp", "triton"])
def kernel(request: pytest.FixtureRequest) -> tuple[Update, str]:
    """A kernel's update, and the device on which it can run here."""
    if request.param == "cpp":
        return cpp_muon.update, "cpu"
    return triton_muon.update, "cuda" if torch.cuda.is_available() else "cpu"


def draw(merged: int, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, gradients and averages."""
    weights, gradients, averages = ([torch.randn(s, device=device) for s in MERGED[merged]] for _ in range(3))
    return weights, gradients, averages


def settings(lr: float | Tensor, **changed: Any) -> MuonStep:
    step = MuonStep(lr, 1, weight_decay=0.1, momentum=0.9, nesterov=True, quintic=QUINTIC, iterations=5)
    return step._replace(**changed)


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
def test_matrices_of_all_shapes_are_updated(seed: int, kernel: tuple[Update, str], merged: int, nesterov: bool) -> None:
    update, device = kernel
    tensors = draw(merged, device)
    results = [expected(*each, 0.5, merged, nesterov) for each in zip(*tensors, strict=True)]
    update(*tensors, settings(0.5, merged=merged, nesterov=nesterov))
    for weight, average, (new_weight, new_average) in zip(tensors[0], tensors[2], results, strict=True):
        assert torch.allclose(average.double().cpu(), new_average, rtol=0, atol=1e-6)
        assert torch.allclose(weight.double().cpu(), new_weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_learning_rate_and_scale_may_be_on_the_device(seed: int, kernel: tuple[Update, str]) -> None:
    update, device = kernel
    by_value, by_tensor = draw(1, device), draw(1, device)
    for ours, theirs in zip(by_tensor, by_value, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(other)
    for gradient in by_tensor[1]:
        gradient *= 1024
    scale, zero = (torch.tensor(value, device=device) for value in (1024.0, 0.0))
    update(*by_value, settings(0.5))
    update(*by_tensor, settings(torch.tensor(0.5, device=device), grad_scale=scale, found_inf=zero))
    for one, other in zip(by_tensor[0] + by_tensor[2], by_value[0] + by_value[2], strict=True):
        assert torch.equal(one, other)


def test_nothing_changes_after_an_overflow(seed: int, kernel: tuple[Update, str]) -> None:
    update, device = kernel
    tensors = draw(1, device)
    tensors[1][0][0, 0] = torch.inf
    before = [tensor.clone() for tensor in tensors[0] + tensors[2]]
    one = torch.ones((), device=device)
    update(*tensors, settings(0.5, grad_scale=one, found_inf=one))
    assert all(torch.equal(a, b) for a, b in zip(tensors[0] + tensors[2], before, strict=True))


def test_more_matrices_than_a_launch_takes(seed: int, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(1, triton_device)
    results = [expected(*each, 0.5, 1, True) for each in zip(*tensors, strict=True)]
    monkeypatch.setattr(triton_muon, "MAX_PARAMETERS", 3)
    triton_muon.update(*tensors, settings(0.5))
    for weight, (new_weight, _) in zip(tensors[0], results, strict=True):
        assert torch.allclose(weight.double().cpu(), new_weight, rtol=0, atol=1e-4)


def test_what_the_kernel_supports() -> None:
    limit = triton_muon.MAX_SHORT_SIDE
    assert fits(torch.zeros(64, 1000), 1, limit) and fits(torch.zeros(192, 65), 3, limit)
    assert not fits(torch.zeros(192, 65), 1, limit)  # its square would not fit into the registers
    assert not fits(torch.zeros(48, 48, dtype=torch.bfloat16), 1, limit)
    assert not fits(torch.zeros(48, 96).mT, 1, limit)
    assert can_update(torch.zeros(48, 48), 1) and not can_update(torch.zeros(48, 48, dtype=torch.bfloat16), 1)
    assert not can_update(torch.zeros(512, 512), 1)  # torch's products are faster


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5), (16, 33), (65, 64), (130, 96), (256, 257)])
def test_any_size_on_the_cpu(seed: int, shape: tuple[int, int]) -> None:
    weight, gradient, average = (torch.randn(shape) for _ in range(3))
    new_weight, _ = expected(weight, gradient, average, 0.5, 1, True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        updated = weight.clone()
        cpp_muon.update([updated], [gradient], [average.clone()], settings(0.5))
        assert torch.allclose(updated.double(), new_weight, rtol=0, atol=2e-4), threads
    torch.set_num_threads(1)


def test_a_machine_without_a_compiler_composes_the_update(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(8, 8)

    def fail(*unused: Any) -> None:
        raise ValueError("muon.cpp cannot be compiled")

    with monkeypatch.context() as patch:
        for name, broken in (("why_unavailable", lambda: "needs a C++ compiler"), ("cpp_library", fail)):
            cpp_muon.is_available.cache_clear()
            patch.setattr(cpp_muon, name, broken)
            assert not can_update(weight, 1), name
    cpp_muon.is_available.cache_clear()
    assert can_update(weight, 1)

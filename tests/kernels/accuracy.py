"""Bounds on rounding errors: a small multiple of the error that a baseline in the same dtype makes against float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MULTIPLE = 4
"""The measured ratio of two correct implementations' errors stays under 3 (36 draws of the tests' models)."""


def distance(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root of the summed squares of all differences, computed in float64."""
    squares = [(result.double() - right).square().sum() for result, right in zip(results, exact, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def assert_accurate(results: Sequence[Tensor], baseline: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Assert that the error of `results` is at most `MULTIPLE` times that of `baseline`.

    One rounding of each element to the results' dtype is allowed in any case, because a baseline of few elements may
    happen to be exact.

    Args:
        results: what is tested.
        baseline: the same function computed by plain torch operators in the same dtype.
        exact: the same function computed in float64.
    """
    norm = float(torch.stack([right.square().sum() for right in exact]).sum().sqrt())
    eps = max(torch.finfo(result.dtype).eps for result in results)
    error, allowed = distance(results, exact), MULTIPLE * distance(baseline, exact) + eps * norm
    assert error <= allowed, f"error {error:.2e} against float64, allowed {allowed:.2e}"


def logits_and_gradients(
    model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits, and the gradients of all parameters."""
    logits = model(images)
    gradients = torch.autograd.grad(loss(logits), list(model.parameters()))
    return [logits.detach()], list(gradients)

"""The loss of a batch, with weights of the classes, shares of classes and label smoothing."""

import pytest
import torch
import torch.nn.functional as F

from fastvit_train.training.optim.loss import Loss, count_correct

CLASSES = 6


def oracle(logits: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Write the definition out, in float64."""
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    smoothed = shares.double() * (1 - smoothing) + smoothing / CLASSES
    return -(weights.double() * smoothed * probabilities.log()).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_its_definition_and_the_mean_of_those_of_two_halves(
    seed: int, smoothing: float, weighted: bool, mixed: bool
) -> None:
    logits, labels = 3 * torch.randn(40, CLASSES), torch.randint(CLASSES, (40,))
    shares = torch.randn(40, CLASSES).softmax(1) if mixed else F.one_hot(labels, CLASSES).float()
    weights = torch.rand(CLASSES) + 0.1 if weighted else torch.ones(CLASSES)
    loss = Loss(smoothing, weights if weighted else None)
    targets = shares if mixed else labels
    got = loss(logits, targets)
    assert got.item() == pytest.approx(oracle(logits, shares, weights, smoothing).item(), rel=1e-5)
    halves = [loss(logits[half], targets[half]) for half in (slice(0, 20), slice(20, 40))]
    assert (sum(halves) / 2).item() == pytest.approx(got.item(), rel=1e-5)


def test_a_mixed_image_counts_as_the_class_with_the_largest_share() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert count_correct(logits, torch.tensor([1, 1, 1])) == 2
    assert count_correct(logits, torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])) == 2

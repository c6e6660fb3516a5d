"""A run's warnings: accuracy that a constant guess reaches, and overfitting with the epoch of the best accuracy."""

from typing import Any

import pytest

from fastvit_train.runs import findings


def rows(train: list[float], test: list[float], accuracy: list[float]) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "train_loss": a, "test_loss": b, "test_accuracy": c}
        for epoch, (a, b, c) in enumerate(zip(train, test, accuracy, strict=True), start=1)
    ]


def summary(accuracy: float, majority_share: float = 0.5) -> dict[str, Any]:
    return {"test_accuracy": accuracy, "majority_share": majority_share, "evaluated_on": "test"}


@pytest.mark.parametrize(("accuracy", "is_warned"), [(0.49, True), (0.5, True), (0.501, False), (1.0, False)])
def test_an_accuracy_that_a_constant_guess_reaches(accuracy: float, is_warned: bool) -> None:
    found = findings.warnings(summary(accuracy), rows([1.0], [1.0], [accuracy]))
    assert len(found) == is_warned
    if is_warned:
        assert found[0].startswith(f"the accuracy, {accuracy:.2%}, is not above the 50.00% that always guessing")


@pytest.mark.parametrize(
    ("train", "test", "epoch"),
    [
        ([2.0, 1.0, 0.5, 0.2], [2.0, 1.5, 1.8, 2.2], 2),
        ([2.0, 1.0, 0.5, 0.2, 0.1, 0.05], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 1),
        ([2.0, 1.0], [1.0, 1.2], 1),
    ],
)
def test_a_test_loss_that_rises_while_the_train_loss_falls(train: list[float], test: list[float], epoch: int) -> None:
    accuracy = [0.6, 0.9, *[0.8] * len(train)][: len(train)]
    (warning,) = findings.warnings(summary(accuracy[-1]), rows(train, test, accuracy))
    assert f"the test loss was lowest in epoch {epoch} ({min(test):.4f}) and rose to {test[-1]:.4f}" in warning
    assert "its best accuracy was 90.00% in epoch 2" in warning


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([2.0, 1.0, 0.5, 0.2], [2.0, 1.5, 1.2, 1.1]),
        ([2.0, 1.0, 0.5, 0.2], [2.0, 1.0, 1.02, 1.04]),
        ([2.0, 1.0, 1.5, 1.8], [2.0, 1.5, 1.8, 2.2]),
        ([2.0, 1.0, 0.9, 0.8], [2.0, 1.0, 1.0, 1.1]),
        ([], []),
    ],
    ids=["both fall", "it rises by less than noise", "both rise", "one noisy epoch", "no epochs"],
)
def test_no_warning_without_overfitting(train: list[float], test: list[float]) -> None:
    assert findings.warnings(summary(0.9), rows(train, test, [0.9] * len(train))) == []


@pytest.mark.parametrize("damaged", [{}, {"test_accuracy": "high", "majority_share": 0.5, "evaluated_on": "test"}])
def test_files_of_an_earlier_version_or_damaged_ones_give_no_warning(damaged: dict[str, Any]) -> None:
    assert findings.warnings(damaged, [{"epoch": 1}]) == []

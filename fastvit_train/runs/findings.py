"""What the results of a run say about it: accuracy that a constant guess reaches, and overfitting."""

from collections.abc import Sequence
from typing import Any

MIN_RISE = 0.05
"""relative rise of the test loss above its minimum that is more than noise between epochs"""
SMOOTHED_EPOCHS = 3
"""number of last epochs whose test losses are averaged, so that one noisy epoch is not taken for a trend"""


def warnings(summary: dict[str, Any], epochs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each finding that a reader of the accuracy must know.

    Args:
        summary: the content of summary.json.
        epochs: the rows of metrics.jsonl.
    """
    try:
        found = [
            constant_guess(summary["test_accuracy"], summary["majority_share"]),
            _overfitting(epochs, summary["evaluated_on"]),
        ]
    except (KeyError, TypeError, ValueError):  # a run of an earlier version, or a damaged file
        return []
    return [sentence for sentence in found if sentence]


def constant_guess(accuracy: float, majority_share: float) -> str:
    """Return a warning if the accuracy is at most the share of the most frequent class (both are fractions)."""
    if accuracy > majority_share:
        return ""
    return (
        f"the accuracy, {accuracy:.2%}, is not above the {majority_share:.2%} that always guessing the largest class "
        "gives; the model has not learned to tell the classes apart: train longer, change --lr, or check the labels"
    )


def _overfitting(epochs: Sequence[dict[str, Any]], evaluated_on: str) -> str:
    """Return a warning if the test loss rose after its minimum while the train loss fell."""
    test, train = ([float(row[key]) for row in epochs] for key in ("test_loss", "train_loss"))
    if not test:
        return ""
    best = min(range(len(test)), key=test.__getitem__)
    after = test[best + 1 :][-SMOOTHED_EPOCHS:]
    if not after or sum(after) / len(after) <= (1 + MIN_RISE) * test[best] or train[-1] >= train[best]:
        return ""
    most_accurate = max(epochs, key=lambda row: float(row["test_accuracy"]))
    return (
        f"the {evaluated_on} loss was lowest in epoch {epochs[best]['epoch']} ({test[best]:.4f}) and rose to "
        f"{test[-1]:.4f} while the train loss fell: the model overfits; its best accuracy was "
        f"{most_accurate['test_accuracy']:.2%} in epoch {most_accurate['epoch']}; train for fewer epochs, or with more "
        "augmentation or data"
    )

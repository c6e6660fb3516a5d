"""Evaluation of a model, sharded over the ranks and exact for every sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fastvit_train.data.balance import majority_share
from fastvit_train.data.loader import EvalLoader

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model for each of N images, on the CPU, in the data set's order.

    Metrics are computed from the gathered predictions, so they do not depend on the world size.
    """

    labels: Tensor
    """true classes, int64 (N,)"""
    predicted: Tensor
    """most probable classes, int64 (N,)"""
    confidence: Tensor
    """their probabilities, (N,)"""
    losses: Tensor
    """cross-entropies, nats (N,)"""
    ahead: Tensor
    """number of classes predicted with a higher probability than the true one, int64 (N,)"""
    num_classes: int

    @property
    def samples(self) -> int:
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Fraction of images whose most probable class is the true one."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def accuracy_error(self) -> float:
        """Standard error of the accuracy, from the number of images: sqrt(p (1 - p) / N)."""
        return (self.accuracy * (1 - self.accuracy) / self.samples) ** 0.5

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        return self.recall().nanmean().item()

    @property
    def balanced_accuracy_error(self) -> float:
        """Standard error of the balanced accuracy, from the number of images of each class."""
        recall, images = self.recall(), self.labels.bincount(minlength=self.num_classes)
        variances = (recall * (1 - recall) / images)[images > 0]
        return variances.sum().sqrt().item() / len(variances)

    @property
    def majority_share(self) -> float:
        """Fraction of images in the most frequent class: the accuracy of always guessing that class."""
        return majority_share(self.labels)

    @property
    def top5_accuracy(self) -> float:
        """Fraction of images whose true class is among the five most probable."""
        return (self.ahead < 5).double().mean().item()

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that have images of F1 = 2 TP / (images + predictions), with TP right predictions."""
        images, predictions = (
            classes.bincount(minlength=self.num_classes) for classes in (self.labels, self.predicted)
        )
        return (2 * self._true_positives() / (images + predictions))[images > 0].mean().item()

    def positive_probability(self) -> Tensor:
        """Return the probability of the second of two classes, float64 (N,)."""
        confidence = self.confidence.double()
        return torch.where(self.predicted == 1, confidence, 1 - confidence)

    def roc(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count what each threshold on the probability of the second class accepts, from the highest to the lowest.

        Returns:
            False positive rate, true positive rate and precision at each distinct threshold, float64 (thresholds,).
        """
        probability, order = self.positive_probability().sort(descending=True)
        positives = (self.labels[order] == 1).double().cumsum(0)
        last_of_equals = torch.cat((probability[1:] != probability[:-1], torch.tensor([True])))
        accepted = torch.arange(1, self.samples + 1, dtype=torch.float64)[last_of_equals]
        true = positives[last_of_equals]
        negatives = self.samples - positives[-1]
        return (accepted - true) / negatives, true / positives[-1], true / accepted

    @property
    def roc_auc(self) -> float | None:
        """Area under the ROC curve: the chance that an image of the second class is ranked above one of the first.

        None unless there are two classes, and images of both.
        """
        if not self._has_two_classes():
            return None
        false, true, _ = self.roc()
        origin = false.new_zeros(1)
        return torch.trapezoid(torch.cat((origin, true)), torch.cat((origin, false))).item()

    @property
    def average_precision(self) -> float | None:
        """Mean of the precision over the recalls that the thresholds add: sum of (R_n - R_(n-1)) P_n; None as above."""
        if not self._has_two_classes():
            return None
        _, recall, precision = self.roc()
        return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()

    def _has_two_classes(self) -> bool:
        return self.num_classes == 2 and len(self.labels.unique()) == 2

    def confusion(self) -> Tensor:
        """Return the confusion matrix: images of each true class (row) by predicted class (column), int64."""
        pairs = self.labels * self.num_classes + self.predicted
        return pairs.bincount(minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def precision(self) -> Tensor:
        """Return the precision of each class, (num_classes,); NaN if the class was never predicted."""
        return self._true_positives() / self.predicted.bincount(minlength=self.num_classes)

    def recall(self) -> Tensor:
        """Return the recall of each class, (num_classes,); NaN if the class has no images."""
        return self._true_positives() / self.labels.bincount(minlength=self.num_classes)

    def _true_positives(self) -> Tensor:
        """Return the number of correctly predicted images of each class, (num_classes,)."""
        return self.labels[self.predicted == self.labels].bincount(minlength=self.num_classes).double()

    def calibration_error(self) -> float:
        """Return the expected calibration error: the mean of |accuracy - confidence| over 15 equal bins of confidence.

        Source: Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).
        """
        bins = (self.confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        excess = (self.predicted == self.labels).double() - self.confidence.double()
        return excess.new_zeros(CALIBRATION_BINS).index_add_(0, bins, excess).abs().sum().item() / self.samples


@torch.no_grad()
def evaluate_model(
    model: nn.Module, loader: EvalLoader, accelerator: Accelerator, after_batch: Callable[[], object] = lambda: None
) -> Evaluation:
    """Evaluate the prepared `model`; all ranks return the same result. Leaves the model in evaluation mode.

    Args:
        model: as Accelerate prepared it.
        loader: this rank's batches.
        accelerator: this rank's.
        after_batch: called after every batch.
    """
    model.eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64  # represents class indices exactly too
    rows_of_all = torch.zeros(loader.padded_size, 4, dtype=exact, device=accelerator.device)
    num_classes = 0
    for images, labels, indices in loader:
        logits = model(images).float()
        num_classes = logits.shape[1]
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidence, predicted = logits.softmax(1).max(1)
        ahead = _ahead(logits, labels)
        rows = torch.stack([figure.to(exact) for figure in (losses, confidence, predicted, ahead)], 1)
        rows_of_all.index_copy_(0, indices, rows)
        after_batch()
    # Every row was written by one rank and is zero on the others.
    losses, confidence, predicted, ahead = accelerator.reduce(rows_of_all, "sum")[: len(loader.labels)].cpu().unbind(1)
    return Evaluation(loader.labels.cpu(), predicted.long(), confidence, losses, ahead.long(), num_classes)


def _ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of classes ranked above the true one, (batch,); ties go to the first class, as in argmax."""
    true = logits.gather(1, labels[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) >= labels[:, None]
    behind = (logits < true) | (logits == true) & later
    return logits.shape[1] - behind.sum(1)  # a NaN counts as ranked above

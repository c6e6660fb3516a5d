"""Evaluation, sharded over the processes and exact to the sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fastvit_train.data.loader import EvalLoader

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What a model said of each of N images, on the CPU, in the data set's order; the figures follow from it.

    As nothing is summed before all of it is together, the figures don't depend on the number of processes.
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
    """classes held for more probable than the true one, int64 (N,)"""
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
    def top5_accuracy(self) -> float:
        """Fraction of images whose true class is among the five most probable."""
        return (self.ahead < 5).double().mean().item()

    def confusion(self) -> Tensor:
        """How many images of each class (row) were taken for which (column), int64 (num_classes, num_classes)."""
        pairs = self.labels * self.num_classes + self.predicted
        return pairs.bincount(minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def precision(self) -> Tensor:
        """Of the images taken for each class, the fraction that are of it, (num_classes,); NaN where none was."""
        return self._right() / self.predicted.bincount(minlength=self.num_classes)

    def recall(self) -> Tensor:
        """Of the images of each class, the fraction taken for it, (num_classes,); NaN where there is none."""
        return self._right() / self.labels.bincount(minlength=self.num_classes)

    def _right(self) -> Tensor:
        """Images of each class that were taken for it, (num_classes,)."""
        return self.labels[self.predicted == self.labels].bincount(minlength=self.num_classes).double()

    def calibration_error(self) -> float:
        """Expected calibration error: |accuracy - confidence|, over 15 equal bins of confidence, by their images.

        Source: Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).
        """
        bins = (self.confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        excess = (self.predicted == self.labels).double() - self.confidence.double()
        return excess.new_zeros(CALIBRATION_BINS).index_add_(0, bins, excess).abs().sum().item() / self.samples


@torch.no_grad()
def evaluate_model(
    model: nn.Module, loader: EvalLoader, accelerator: Accelerator, after_batch: Callable[[], object] = lambda: None
) -> Evaluation:
    """Evaluate the prepared `model`; the same on every process. Leaves the model in evaluation mode.

    `after_batch` is called after every batch.
    """
    model.eval()
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64  # whole numbers too
    said = torch.zeros(loader.padded_size, 4, dtype=exact, device=accelerator.device)
    num_classes = 0
    for images, labels, indices in loader:
        logits = model(images).float()
        num_classes = logits.shape[1]
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidence, predicted = logits.softmax(1).max(1)
        ahead = _ahead(logits, labels)
        rows = torch.stack([figure.to(exact) for figure in (losses, confidence, predicted, ahead)], 1)
        said.index_copy_(0, indices, rows)
        after_batch()
    # Every row was written by one rank and is zero on the others.
    losses, confidence, predicted, ahead = accelerator.reduce(said, "sum")[: len(loader.labels)].cpu().unbind(1)
    return Evaluation(loader.labels.cpu(), predicted.long(), confidence, losses, ahead.long(), num_classes)


def _ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """Classes held for more probable than the true one, (batch,); of equals the first, as argmax has it."""
    true = logits.gather(1, labels[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) >= labels[:, None]
    behind = (logits < true) | (logits == true) & later
    return logits.shape[1] - behind.sum(1)  # what is no number is behind nothing

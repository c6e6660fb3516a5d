"""What a training step minimizes, and how many of its predictions are right."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.schema import OptimConfig
from fastvit_train.data.balance import class_weights
from fastvit_train.data.datasets import DatasetSpec


@dataclass(frozen=True)
class Loss:
    """Cross-entropy, nats, as the mean over a batch; `labels` are classes or, for mixed images, shares of classes.

    With weights of the classes, an image counts as its class does. The mean is over the number of images, not over the
    sum of their weights, so that batches split over ranks have the loss of the whole batch.
    """

    label_smoothing: float
    class_weights: Tensor | None
    """float32 (classes,), on the device"""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        losses_B = F.cross_entropy(
            logits, labels, self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
        )
        return losses_B.mean()

    def identity(self) -> dict[str, object]:
        """Describe what a resumed run must find unchanged and no setting holds: the weights, which a file may give."""
        if self.class_weights is None:
            return {}
        rounded = " ".join(f"{weight:.6g}" for weight in self.class_weights.tolist())
        return {"weights of --class-weights": hashlib.blake2b(rounded.encode(), digest_size=8).hexdigest()}


def build_loss(
    config: OptimConfig, dataset: DatasetSpec, num_classes: int, device: torch.device, balanced: bool
) -> Loss:
    """Build the loss that `config` asks for; `balanced` says whether the loader draws the classes equally often.

    Raises:
        UserError: if the weights of the classes can't be read.
    """
    weights = None
    if config.class_weights is not None:
        labels = dataset.train.labels
        weights = class_weights(config.class_weights, labels, dataset.classes, num_classes, balanced).to(device)
    return Loss(config.label_smoothing, weights)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of images whose most probable class is the true one, or has the largest share, ()."""
    true = labels if labels.ndim == 1 else labels.argmax(1)
    return (logits.argmax(1) == true).sum()

"""Evaluation, sharded over the processes and exact to the sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from fastvit_train.data.loader import EvalLoader


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats) and accuracy (a fraction) over `samples` images."""

    loss: float
    accuracy: float
    samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, accelerator: Accelerator, tick: Callable[[], object] = lambda: None
) -> Evaluation:
    """Evaluate the prepared `model`; the same numbers on every process. Leaves the model in evaluation mode.

    `tick` is called after every batch.
    """
    model.eval()
    # Sums instead of accelerate's gather: padding counts for nothing, so no sample counts twice.
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(3, dtype=exact, device=accelerator.device)
    for images, labels, mask in loader:
        mask = mask.to(exact)
        logits = model(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        sums += torch.stack(((losses * mask).sum(), ((logits.argmax(1) == labels) * mask).sum(), mask.sum()))
        tick()
    loss, correct, samples = accelerator.reduce(sums, "sum").tolist()
    return Evaluation(loss / samples, correct / samples, round(samples))

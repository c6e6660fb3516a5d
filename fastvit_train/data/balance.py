"""The classes in training: weights in the loss, balanced samples, and stratified batches."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_json

AUTO = "auto"


def majority_share(labels: Tensor) -> float:
    """Return the fraction of `labels`, int64, in the most frequent class: the accuracy of always guessing it."""
    return labels.bincount().max().item() / len(labels)


def class_weights(
    choice: str, labels: Tensor, classes: Sequence[str], num_classes: int, balanced: bool = False
) -> Tensor:
    """Return the weight of each class in the loss, float32 (num_classes,); their mean over the drawn samples is 1.

    Args:
        choice: "auto" for weights that are inversely proportional to the number of images of a class; or a JSON file
            with the weight of each class by its name.
        labels: the classes of the training images, int64.
        classes: the names of the classes.
        num_classes: number of the model's outputs; those without a class get the weight 1, and with "auto" so do
            classes without an image.
        balanced: whether equally many samples of each class are drawn; otherwise each image is one.

    Raises:
        UserError: if the file can't be read, or if it does not have one positive weight for each class.
    """
    images = labels.bincount(minlength=len(classes)).double()
    if choice == AUTO:
        weights = 1 / images.clamp(min=1)
    else:
        named = _read(Path(choice), classes)
        weights = torch.tensor([named[name] for name in classes], dtype=torch.float64)
    drawn = (images > 0).double() if balanced else images
    scaled = weights * (drawn.sum() / (weights * drawn).sum())
    if choice == AUTO:
        scaled = torch.where(images > 0, scaled, 1.0)
    return torch.cat((scaled, scaled.new_ones(num_classes - len(classes)))).float()


def _read(path: Path, classes: Sequence[str]) -> dict[str, float]:
    """Return the weights in a JSON file by the names of the classes."""
    example = f"it holds a weight for each class, as in {json.dumps(dict.fromkeys(classes[:2], 1.5))}"
    try:
        named = read_json(path)
    except OSError as error:
        raise UserError(f"--class-weights {path} can't be read ({error.strerror}); allowed: auto, or a file") from None
    except ValueError as error:
        raise UserError(f"--class-weights {path} is not JSON ({error}); {example}") from None
    if not isinstance(named, dict) or set(named) != set(classes):
        names = set(named) if isinstance(named, dict) else set()
        wrong = ", ".join(
            [f"without {name!r}" for name in classes if name not in names]
            + [f"with {name!r}" for name in sorted(names - set(classes))]
        )
        raise UserError(f"--class-weights {path} does not name the classes of the data set ({wrong}); {example}")
    for name, weight in named.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"--class-weights {path}: {name!r} has the weight {weight!r}; allowed: numbers above 0")
    return named


def draw_balanced(labels: Tensor, stream: torch.Generator) -> Tensor:
    """Draw as many samples as there are labels, equally many of each class (up to one more or less), int64.

    The images of a frequent class are drawn at most once, those of a rare class repeatedly but equally often, up to one
    more or less.
    """
    present = labels.unique()
    shares = torch.full((len(present),), len(labels) // len(present))
    shares[torch.randperm(len(present), generator=stream)[: len(labels) % len(present)]] += 1
    drawn = []
    for label, share in zip(present, shares.tolist(), strict=True):
        samples = (labels == label).nonzero()[:, 0]
        rounds = -(-share // len(samples))
        orders = [samples[torch.randperm(len(samples), generator=stream)] for _ in range(rounds)]
        drawn.append(torch.cat(orders)[:share])
    return torch.cat(drawn)


def stratified_order(labels: Tensor, stream: torch.Generator) -> Tensor:
    """Return all samples in a random order in which each class is spread evenly, int64 (samples,).

    Each of n images of a class is at a random place of its own n-th part of the order. So each batch has nearly the
    class's share, and the gradients of batches vary less (Zhao & Zhang 2014, https://arxiv.org/abs/1405.3080).
    """
    order = torch.randperm(len(labels), generator=stream)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(labels)) - starts + torch.rand(len(labels), generator=stream, dtype=torch.float64)
    return by_class[(places / counts.repeat_interleave(counts)).argsort(stable=True)]

"""Data sets by name."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.data import folder, published
from fastvit_train.data.augment import generator
from fastvit_train.data.images import decode
from fastvit_train.utils.errors import UserError, printable


@dataclass(frozen=True)
class Split:
    """Images, either as one uint8 tensor (samples, 3, height, width) or as files, with their labels (samples,)."""

    images: Tensor | Sequence[Path]
    labels: Tensor

    def take(self, samples: Tensor) -> "Split":
        """The given samples only."""
        if isinstance(self.images, Tensor):
            return Split(self.images[samples], self.labels[samples])
        return Split([self.images[i] for i in samples.tolist()], self.labels[samples])

    def first_of_each_class(self, most: int) -> Tensor:
        """Indices of the first sample of each class, of the first `most` classes that have one."""
        return torch.stack([(self.labels == label).nonzero()[0, 0] for label in self.labels.unique()[:most]])

    def pixels(self, samples: Tensor, image_size: int) -> Tensor:
        """The given samples' images, uint8 (samples, 3, height, width); files are decoded at `image_size`."""
        if isinstance(self.images, Tensor):
            return self.images[samples]
        return torch.stack([decode(self.images[i], image_size) for i in samples.tolist()])


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: its name as printed beside every accuracy, its classes, and what is trained and evaluated on."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    evaluated_on: str = "test"

    def identity(self) -> dict[str, object]:
        """What must be the same for a run to go on: the classes, and which sample has which label."""
        labels = torch.cat((self.train.labels, self.test.labels)).numpy().tobytes()
        return {
            "classes": list(self.classes),
            "training images": len(self.train.labels),
            "test images": len(self.test.labels),
            "labels": hashlib.blake2b(labels, digest_size=8).hexdigest(),
        }


def load_dataset(config: DataConfig, image_size: int) -> DatasetSpec:
    """The data set that `config` names, downloaded where it must be.

    Args:
        config: names the set and where it lies.
        image_size: side in pixels at which a folder's images are decoded; other sets keep their own size.

    Raises:
        UserError: where the data is missing, damaged, or its labels are outside its classes.
    """
    loaders: dict[str, Callable[[], DatasetSpec]] = {
        "digits": _digits,
        "folder": lambda: _folder(config, image_size),
        "synthetic": lambda: _synthetic(image_size),
        **dict.fromkeys(published.PUBLISHED, lambda: _published(config)),
    }
    dataset = loaders[config.dataset]()
    for split_name, split in (("training", dataset.train), ("test", dataset.test)):
        check_labels(split.labels, len(dataset.classes), f"{dataset.name}'s {split_name} set")
    return _hold_out(dataset, config.holdout) if config.holdout else dataset


def count_classes(config: DataConfig) -> int:
    """Return the number of classes of the data set that `config` names, without loading it.

    Raises:
        UserError: if it is a folder of images that is missing or incomplete.
    """
    if config.dataset == "folder":
        return len(folder.find_classes(Path(config.data_dir))[0])
    if config.dataset in published.PUBLISHED:
        return published.PUBLISHED[config.dataset].num_classes
    return {"digits": 10, "synthetic": 10}[config.dataset]


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise UserError unless there are labels and all are in 0 .. num_classes - 1."""
    if not len(labels):
        raise UserError(f"{what} is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{what} has labels from {low} to {high}, outside the {num_classes} classes; "
            f"allowed: 0 to {num_classes - 1}"
        )


def _stratified(labels: Tensor, fraction: float, purpose: str) -> tuple[Tensor, Tensor]:
    """Fixed disjoint sample indices (rest, part) with `fraction` of each class, at least one sample, in the part."""
    stream = generator(0, purpose)
    part = []
    for label in labels.unique():
        samples = (labels == label).nonzero()[:, 0]
        count = max(1, round(len(samples) * fraction))
        part.append(samples[torch.randperm(len(samples), generator=stream)[:count]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(part)] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def _hold_out(dataset: DatasetSpec, fraction: float) -> DatasetSpec:
    rest, held_out = _stratified(dataset.train.labels, fraction, "holdout")
    if not len(rest):
        raise UserError(f"--holdout {fraction} leaves nothing of {len(held_out)} training images to train on")
    train, test = dataset.train.take(rest), dataset.train.take(held_out)
    return replace(dataset, train=train, test=test, evaluated_on="holdout")


def _digits() -> DatasetSpec:
    """scikit-learn's digits (UCI, Alpaydin & Kaynak 1998): 1,797 images of 8x8, made 3x32x32; a fifth to test on."""
    with (files("fastvit_train.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"]).float().unsqueeze(1) * (255 / 16)
        labels = torch.from_numpy(archive["labels"]).long()
    images = F.interpolate(images, (32, 32), mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    everything = Split(images.contiguous(), labels)
    train, test = _stratified(labels, 0.2, "digits")
    return DatasetSpec("digits", tuple("0123456789"), everything.take(train), everything.take(test))


def _published(config: DataConfig) -> DatasetSpec:
    data = published.load(config.dataset, Path(config.data_dir), config.data_url)
    title = published.PUBLISHED[config.dataset].title
    return DatasetSpec(title, data.classes, Split(*data.train), Split(*data.test))


def _folder(config: DataConfig, image_size: int) -> DatasetSpec:
    root = Path(config.data_dir)
    listing = folder.list_images(root)
    splits = folder.load(listing, image_size, config.stream)
    train, test = (Split(images, labels) for images, labels in splits)
    return DatasetSpec(printable(root.resolve().name), listing.classes, train, test, listing.test_name)


def _synthetic(image_size: int) -> DatasetSpec:
    """Noise around one random pattern per class: learnable, any size, nothing to load; 4,096 + 1,024 images."""
    needed = (4096 + 1024) * 3 * image_size**2
    if needed > (free := folder.free_memory()):
        raise UserError(
            f"synthetic images of {image_size} pixels take {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        )
    stream = generator(0, "synthetic")
    patterns = F.interpolate(torch.rand(10, 3, 4, 4, generator=stream), image_size, mode="bilinear")

    def split(count: int) -> Split:
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 128, (count, 3, image_size, image_size), dtype=torch.uint8, generator=stream)
        return Split(noise + (patterns * 127).to(torch.uint8)[labels], labels)

    return DatasetSpec("synthetic", tuple("0123456789"), split(4096), split(1024))

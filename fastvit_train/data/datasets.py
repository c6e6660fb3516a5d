"""Data sets by name: their classes, and their training and test splits."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import DataConfig
from fastvit_train.config.validation import HUGGING_FACE
from fastvit_train.data.augmentation.augment import generator
from fastvit_train.data.decode import ImageFiles, decode_all
from fastvit_train.data.rendering import Rendering, to_gray
from fastvit_train.data.sources import folder, hugging_face, published, shards
from fastvit_train.utils.errors import UserError, counted

MAX_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """Images, as one uint8 tensor (samples, channels, height, width) or as files, and labels, int64 (samples,)."""

    images: Tensor | ImageFiles
    labels: Tensor

    def take(self, samples: Tensor) -> "Split":
        """Return a split with these samples only."""
        if isinstance(self.images, Tensor):
            return Split(self.images[samples], self.labels[samples])
        return Split(self.images.take(samples.tolist()), self.labels[samples])

    def first_of_each_class(self, max_classes: int) -> Tensor:
        """Return the index of the first sample of each class, for the first `max_classes` classes that have samples."""
        return torch.stack([(self.labels == label).nonzero()[0, 0] for label in self.labels.unique()[:max_classes]])

    def pixels(self, samples: Tensor, input_size: InputSize) -> Tensor:
        """Return these samples' images, uint8 (samples, channels, height, width); files are decoded.

        Raises:
            UserError: with the name of the first file that can't be decoded.
        """
        if isinstance(self.images, Tensor):
            return self.images[samples]
        return decode_all(self.images.take(samples.tolist()), input_size)

    def resized_pixels(self, samples: Tensor, input_size: InputSize) -> Tensor:
        """Return these samples' images, resized: uint8 (samples, *input_size)."""
        images = self.pixels(samples, input_size)
        if images.shape[-2:] == input_size.sides:
            return images
        return F.interpolate(images.float(), input_size.sides, mode="bilinear", antialias=True).round().to(torch.uint8)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: the name that is printed with every accuracy, its classes, and its splits.

    `evaluated_on` is the name of the split in `test`, such as "test", "val" or "holdout". `notes` are lines to print,
    about images that were passed over or changed.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    evaluated_on: str = "test"
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, object]:
        """Describe what a resumed run must find unchanged: the classes, and the label of each sample."""
        labels = torch.cat((self.train.labels, self.test.labels)).numpy().tobytes()
        return {
            "classes": list(self.classes),
            "training images": len(self.train.labels),
            "test images": len(self.test.labels),
            "labels": hashlib.blake2b(labels, digest_size=8).hexdigest(),
        }


def load_dataset(
    config: DataConfig, input_size: InputSize, examine_streamed: bool = False, imitate: bool = False
) -> DatasetSpec:
    """Load the data set that `config` names; download it if it is not in `config.data_dir`.

    Args:
        config: names the data set and what is held out.
        input_size: channels of all images, and height and width of decoded and of synthetic ones; other data sets keep
            their own height and width.
        examine_streamed: look at the header of every image that is streamed, so that damaged ones are reported now.
        imitate: return synthetic images of the same shape and number instead of downloading a data set.

    Raises:
        UserError: if the data set is not available or is damaged, if a label is outside its classes, or if no training
            images of a class are left.
    """
    loaders: dict[str, Callable[[], DatasetSpec]] = {
        "digits": lambda: _digits(input_size.channels),
        "folder": lambda: _folder(config, input_size, examine_streamed),
        "shards": lambda: _shards(config, input_size, examine_streamed),
        "synthetic": lambda: _synthetic(input_size),
        **dict.fromkeys(published.PUBLISHED, lambda: _published(config, input_size.channels)),
    }
    if config.dataset.startswith(HUGGING_FACE):
        loaders[config.dataset] = lambda: _rows(config, input_size, examine_streamed)
    imitate = imitate and config.dataset in published.PUBLISHED
    if imitate and not published.is_available(config.dataset, Path(config.data_dir)):
        dataset = _imitation(config, input_size.channels)
    else:
        dataset = loaders[config.dataset]()
    if config.holdout:
        dataset = _hold_out(dataset, config)
    for split_name, split in (("training", dataset.train), ("test", dataset.test)):
        check_labels(split.labels, len(dataset.classes), f"{dataset.name}'s {split_name} set")
    return dataset


def count_classes(config: DataConfig) -> int:
    """Return the number of classes of the data set that `config` names, without loading it.

    Raises:
        UserError: if it is a folder that is missing, incomplete or damaged, or if the Hub does not have it.
    """
    if config.dataset == "folder":
        return len(folder.find_layout(Path(config.data_dir), config.holdout > 0).train)
    if config.dataset == "shards":
        return shards.count_classes(Path(config.data_dir), config.holdout > 0)
    if config.dataset.startswith(HUGGING_FACE):
        return hugging_face.count_classes(config.dataset)
    if config.dataset in published.PUBLISHED:
        return published.PUBLISHED[config.dataset].num_classes
    return {"digits": 10, "synthetic": 10}[config.dataset]


def check_files(config: DataConfig) -> None:
    """Raise UserError if the data set is a folder of images or shards that is incomplete; no image is opened."""
    if config.dataset == "folder":
        folder.list_images(Path(config.data_dir), config.holdout > 0)
    if config.dataset == "shards":
        shards.count_classes(Path(config.data_dir), config.holdout > 0)


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise UserError if there are no labels, or if one is outside 0 .. num_classes - 1."""
    if not len(labels):
        raise UserError(f"{what} is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{what} has labels from {low} to {high}, but the model has {counted(num_classes, 'class')}; "
            f"allowed: labels from 0 to {num_classes - 1}"
        )


def _stratified(labels: Tensor, fraction: float, purpose: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split sample indices into (rest, part), reproducibly; part has `fraction` of each class, at least one."""
    stream = generator(seed, purpose)
    part = []
    for label in labels.unique():
        samples = (labels == label).nonzero()[:, 0]
        count = max(1, round(len(samples) * fraction))
        part.append(samples[torch.randperm(len(samples), generator=stream)[:count]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(part)] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def _hold_out(dataset: DatasetSpec, config: DataConfig) -> DatasetSpec:
    """Replace the test set by a part of the training set."""
    labels = dataset.train.labels
    rest, held_out = _stratified(labels, config.holdout, "holdout", config.holdout_seed)
    if emptied := sorted(set(labels.tolist()) - set(labels[rest].tolist())):
        count = labels.bincount()
        names = ", ".join(f"{dataset.classes[label]} ({count[label]})" for label in emptied[:MAX_CLASSES_SHOWN])
        raise UserError(
            f"--holdout {config.holdout} holds out all training images of {len(emptied):,} of {len(dataset.classes):,} "
            f"classes: {names}{', ...' if len(emptied) > MAX_CLASSES_SHOWN else ''}; lower it, or add images: each "
            "class needs two at least"
        )
    train, test = dataset.train.take(rest), dataset.train.take(held_out)
    return replace(dataset, train=train, test=test, evaluated_on="holdout")


def _digits(channels: int) -> DatasetSpec:
    """Load scikit-learn's digits (UCI, Alpaydin & Kaynak 1998): 1,797 images, 8x8 made 32x32; a fifth for test."""
    with (files("fastvit_train.data") / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"]).float().unsqueeze(1) * (255 / 16)
        labels = torch.from_numpy(archive["labels"]).long()
    images = F.interpolate(images, (32, 32), mode="bilinear").round().to(torch.uint8).expand(-1, channels, -1, -1)
    everything = Split(images.contiguous(), labels)
    train, test = _stratified(labels, 0.2, "digits")
    return DatasetSpec("digits", tuple("0123456789"), everything.take(train), everything.take(test))


def _published(config: DataConfig, channels: int) -> DatasetSpec:
    data = published.load(config.dataset, Path(config.data_dir), config.data_url)
    title = published.PUBLISHED[config.dataset].title
    train, test = (
        Split(to_gray(images) if channels == 1 else images, labels) for images, labels in (data.train, data.test)
    )
    return DatasetSpec(title, data.classes, train, test)


def _folder(config: DataConfig, input_size: InputSize, examine_streamed: bool) -> DatasetSpec:
    listing = folder.list_images(Path(config.data_dir), config.holdout > 0)
    return _load_listed(listing, config, input_size, examine_streamed)


def _shards(config: DataConfig, input_size: InputSize, examine_streamed: bool) -> DatasetSpec:
    listing, notes = shards.list_members(Path(config.data_dir), config.holdout > 0)
    dataset = _load_listed(listing, config, input_size, examine_streamed)
    return replace(dataset, notes=(*notes, *dataset.notes))


def _rows(config: DataConfig, input_size: InputSize, examine_streamed: bool) -> DatasetSpec:
    listing, note = hugging_face.list_rows(config.dataset, config.holdout > 0)
    dataset = _load_listed(listing, config, input_size, examine_streamed)
    return replace(dataset, notes=(note, *dataset.notes))


def _load_listed(
    listing: folder.Listing, config: DataConfig, input_size: InputSize, examine_streamed: bool
) -> DatasetSpec:
    loaded = folder.load(listing, input_size, config.stream, Rendering.of(config), examine_streamed)
    return DatasetSpec(
        listing.title,
        listing.classes,
        Split(loaded.train, listing.train[1]),
        Split(loaded.test, listing.test[1]),
        listing.test_name,
        loaded.notes,
    )


def _imitation(config: DataConfig, channels: int) -> DatasetSpec:
    """Make synthetic images with the sides, the number and the classes of a published data set."""
    original = published.PUBLISHED[config.dataset]
    note = (
        f"{original.title} is not in {config.data_dir}: synthetic images of its shape and number are used instead; "
        "training downloads it"
    )
    synthetic = _synthetic(InputSize(channels, 32, 32), original.num_classes, original.num_images)
    return replace(synthetic, name=f"synthetic {original.title}", notes=(note,))


def _synthetic(input_size: InputSize, num_classes: int = 10, num_images: tuple[int, int] = (4096, 1024)) -> DatasetSpec:
    """Make training and test images of any size: noise around one random pattern per class."""
    needed = sum(num_images) * input_size.nbytes
    if needed > (free := folder.free_memory()):
        raise UserError(
            f"synthetic images of {input_size} pixels take {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free; lower --image-size"
        )
    stream = generator(0, "synthetic")
    patterns = torch.rand(num_classes, input_size.channels, 4, 4, generator=stream)
    patterns = F.interpolate(patterns, input_size.sides, mode="bilinear")

    def make_split(count: int) -> Split:
        labels = torch.arange(count) % num_classes
        noise = torch.randint(0, 128, (count, *input_size), dtype=torch.uint8, generator=stream)
        return Split(noise + (patterns * 127).to(torch.uint8)[labels], labels)

    train, test = map(make_split, num_images)
    return DatasetSpec("synthetic", tuple(map(str, range(num_classes))), train, test)

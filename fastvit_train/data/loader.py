"""Batches for training and evaluation: what is in them depends on (seed, epoch) alone, never on the world size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augment import Augment, generator
from fastvit_train.data.images import Images, to_device
from fastvit_train.utils.errors import UserError

MOST_PROCESSES_NAMED = 1024


@dataclass(frozen=True)
class Place:
    """Where this process stands among all: its device, its rank and how many there are."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class Preprocess:
    """uint8 or float images (0 to 255) to normalised float32 at the model's size, on the device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], image_size: int, device: torch.device) -> None:
        self._image_size = image_size
        self._scale = (1 / (255 * torch.tensor(std, device=device)))[:, None, None]
        self._offset = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device))[:, None, None]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.float()
        if images_BCHW.shape[-1] != self._image_size or images_BCHW.shape[-2] != self._image_size:
            images_BCHW = F.interpolate(images_BCHW, self._image_size, mode="bilinear", antialias=True)
        return torch.addcmul(self._offset, images_BCHW, self._scale)


def check_batch_size(batch_size: int, world_size: int, grad_accum: int) -> None:
    """Raise UserError unless world_size * grad_accum divides batch_size; says which world sizes can."""
    if batch_size % (world_size * grad_accum):
        most = min(batch_size, MOST_PROCESSES_NAMED)
        allowed = [n for n in range(1, most + 1) if batch_size % (n * grad_accum) == 0]
        raise UserError(
            f"--batch-size {batch_size} can't be cut evenly into {world_size} processes x {grad_accum} micro-batches; "
            f"with --grad-accum {grad_accum} it can be among {', '.join(map(str, allowed)) or 'no number of'} processes"
        )


def fit_batch_size(batch_size: int, num_samples: int, world_size: int, grad_accum: int) -> int:
    """`batch_size`, or where the training set is smaller the largest that can be cut evenly.

    Raises:
        UserError: where the set is too small to cut.
    """
    parts = world_size * grad_accum
    if num_samples < parts:
        raise UserError(f"{num_samples} training images are too few for {parts} processes x micro-batches")
    return min(batch_size, num_samples - num_samples % parts)


class TrainLoader:
    """Shuffled, augmented micro-batches of one rank; a ragged last batch is left out of the epoch."""

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        config: DataConfig,
        preprocess: Preprocess,
        batch_size: int,
        grad_accum: int,
        seed: int,
        place: Place,
    ) -> None:
        self._images = images
        self._labels = labels.to(place.device)
        self._preprocess = preprocess
        self._augment = Augment(config, len(labels), seed, place.device)
        self._batch_size = batch_size
        self._grad_accum = grad_accum
        self._seed = seed
        self._place = place
        self.steps_per_epoch = len(labels) // batch_size

    def sample_order(self, epoch: int) -> Tensor:
        """Sample indices of every micro-batch over all ranks, (steps, grad_accum, batch_size / grad_accum)."""
        order = torch.randperm(len(self._labels), generator=generator(self._seed, "order", epoch))
        used = order[: self.steps_per_epoch * self._batch_size]
        return used.view(self.steps_per_epoch, self._grad_accum, -1)

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's (images, labels) of each micro-batch, from optimizer step `first_step` of the epoch on."""
        self._augment.start_epoch(epoch)
        own = self.sample_order(epoch)[first_step:, :, self._place.rank :: self._place.world_size]
        samples = list(own.flatten(0, 1))
        on_device = to_device(samples, self._place.device)
        for samples_B, images in zip(on_device, self._images.batches(samples), strict=True):
            images = self._augment.crop_and_flip(images, samples_B)
            yield self._augment.cutout(self._preprocess(images), samples_B), self._labels[samples_B]


class EvalLoader:
    """All samples once, in order, cut evenly among the ranks; the last batches are filled up by padding."""

    def __init__(self, images: Images, labels: Tensor, preprocess: Preprocess, batch_size: int, place: Place) -> None:
        self._images = images
        self._preprocess = preprocess
        self._place = place
        self.labels = labels.to(place.device)
        self.batch_size = min(batch_size, -(-len(labels) // place.world_size))
        """images of this rank in each batch"""
        stride = self.batch_size * place.world_size
        self.places = -(-len(labels) // stride) * stride
        """samples and padding of all ranks"""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (images, labels, places); the same number of equally large batches on every rank.

        A place is a sample's index; padding, which repeats the last sample, has the places from their number on.
        """
        own = torch.arange(self.places).view(-1, self._place.world_size, self.batch_size)[:, self._place.rank]
        samples = list(own.clamp(max=len(self.labels) - 1))
        on_device = to_device(samples, self._place.device)
        places = own.to(self._place.device)
        for places_B, samples_B, images in zip(places, on_device, self._images.batches(samples), strict=True):
            yield self._preprocess(images), self.labels[samples_B], places_B

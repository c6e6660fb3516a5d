"""Batches for training and evaluation. Their content depends on (seed, epoch) only, never on the world size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augmentation.augment import Augment, generator
from fastvit_train.data.augmentation.epoch_table import EpochTable
from fastvit_train.data.balance import draw_balanced, stratified_order
from fastvit_train.data.images import Images, ResidentImages, to_device
from fastvit_train.utils.errors import UserError, counted

MAX_WORLD_SIZE_LISTED = 1024


@dataclass(frozen=True)
class RankInfo:
    """This process's device, its rank, and the world size."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class Preprocess:
    """Turn uint8 or float images (0 to 255) into normalised float32 images of the model's size, on the device."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], input_size: InputSize, device: torch.device
    ) -> None:
        self._sides = input_size.sides
        self._scale = (1 / (255 * torch.tensor(std, device=device)))[:, None, None]
        self._offset = (-torch.tensor(mean, device=device) / torch.tensor(std, device=device))[:, None, None]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.float()
        if images_BCHW.shape[-2:] != self._sides:
            images_BCHW = F.interpolate(images_BCHW, self._sides, mode="bilinear", antialias=True)
        return torch.addcmul(self._offset, images_BCHW, self._scale)

    def to_pixels(self, images_BCHW: Tensor) -> Tensor:
        """Return what normalised images look like, uint8 (batch, channels, height, width)."""
        return ((images_BCHW - self._offset) / self._scale).round().clamp(0, 255).to(torch.uint8)


def check_batch_size(batch_size: int, world_size: int, grad_accum: int) -> None:
    """Raise UserError unless world_size * grad_accum divides batch_size; the message lists the world sizes that fit."""
    if batch_size % (world_size * grad_accum):
        largest = min(batch_size, MAX_WORLD_SIZE_LISTED)
        allowed = [n for n in range(1, largest + 1) if batch_size % (n * grad_accum) == 0]
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of {counted(world_size, 'process')} x "
            f"{counted(grad_accum, 'micro-batch')}; "
            f"world sizes allowed with --grad-accum {grad_accum}: {', '.join(map(str, allowed)) or 'none'}"
        )


def fit_batch_size(batch_size: int, num_samples: int, world_size: int, grad_accum: int) -> int:
    """Return `batch_size`, or the largest one that all ranks can share evenly if the training set has fewer samples.

    Raises:
        UserError: if the training set has fewer samples than one batch needs.
    """
    divisor = world_size * grad_accum
    if num_samples < divisor:
        raise UserError(
            f"too few training images ({num_samples:,}) for {counted(world_size, 'process')} x "
            f"{counted(grad_accum, 'micro-batch')}; "
            "lower --grad-accum, or start fewer processes"
        )
    return min(batch_size, num_samples - num_samples % divisor)


class TrainLoader:
    """Shuffled, augmented micro-batches of one rank; an incomplete last batch is dropped, as by `drop_last=True`."""

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        config: DataConfig,
        preprocess: Preprocess,
        batch_size: int,
        grad_accum: int,
        seed: int,
        rank_info: RankInfo,
        num_classes: int = 0,
    ) -> None:
        self._images = images
        self._labels = labels.to(rank_info.device)
        self._num_classes = num_classes
        self._config = config
        self._preprocess = preprocess
        self._augment = Augment(config, len(labels), seed, rank_info.device)
        self._positions = EpochTable(len(labels), rank_info.device) if config.sampler == "balanced" else None
        self._batch_size = batch_size
        self._grad_accum = grad_accum
        self._seed = seed
        self._rank_info = rank_info
        self.steps_per_epoch = len(labels) // batch_size
        self.augmented: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._augmented
        """maps images and their sample indices to the model's input and labels; may be replaced by its compiled form"""

    def with_seed(self, seed: int) -> Self:
        """Return the loader of another run with the same images, which both read from the same memory."""
        return self._copy(seed, self._grad_accum)

    def with_grad_accum(self, grad_accum: int) -> Self:
        """Return the loader of the same batches in another number of micro-batches."""
        return self._copy(self._seed, grad_accum)

    def _copy(self, seed: int, grad_accum: int) -> Self:
        return type(self)(
            self._images, self._labels, self._config, self._preprocess, self._batch_size, grad_accum, seed,
            self._rank_info, self._num_classes,
        )  # fmt: skip

    def sample_order(self, epoch: int) -> Tensor:
        """Return the positions in the data set of the samples of all ranks, as `start_epoch` orders them."""
        order = self._order(epoch)
        return order if self._positions is None else self._draw_positions(epoch)[order]

    def _draw_positions(self, epoch: int) -> Tensor:
        """Return the positions in the data set of the samples that balanced sampling draws, by their index."""
        return draw_balanced(self._labels.cpu(), generator(self._seed, "balanced", epoch))

    def _order(self, epoch: int) -> Tensor:
        """Return sample indices in the order of the epoch, (steps, grad_accum, batch_size / grad_accum)."""
        stream = generator(self._seed, "order", epoch)
        if self._config.sampler == "stratified":
            order = stratified_order(self._labels.cpu(), stream)
        else:
            order = torch.randperm(len(self._labels), generator=stream)
        used = order[: self.steps_per_epoch * self._batch_size]
        return used.view(self.steps_per_epoch, self._grad_accum, -1)

    def start_epoch(self, epoch: int) -> Tensor:
        """Draw the samples of `epoch` and their augmentation.

        Returns:
            This rank's sample indices, on the CPU, (steps, grad_accum, images of one micro-batch). A sample is an image
            with its augmentation: balanced sampling draws some images as several samples.
        """
        self._augment.start_epoch(epoch)
        if self._positions is not None:
            self._positions.fill(self._draw_positions(epoch))
        return self._order(epoch)[:, :, self._rank_info.rank :: self._rank_info.world_size]

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's (images, labels) of each micro-batch, starting at optimizer step `first_step`.

        Labels are int64 (batch,) or, if images are mixed, shares of the classes, float32 (batch, classes).
        """
        yield from self.batches(list(self.start_epoch(epoch)[first_step:].flatten(0, 1)))

    def batches(self, samples: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) for sample indices of the epoch under way, on the CPU."""
        needed = [self._augment.with_partners(samples_B) for samples_B in samples]
        on_device = to_device(needed, self._rank_info.device)
        images = self._images.batches([self._positions_of(samples_N) for samples_N in needed])
        for images_NCHW, samples_N in zip(images, on_device, strict=True):
            yield self.augmented(images_NCHW, samples_N)

    def to_pixels(self, images_BCHW: Tensor) -> Tensor:
        """Return what images of a batch look like, uint8 (batch, channels, height, width)."""
        return self._preprocess.to_pixels(images_BCHW)

    @property
    def is_resident(self) -> bool:
        """Whether all images are on the device, so that `batch` can select some of them."""
        return isinstance(self._images, ResidentImages)

    def batch(self, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (images, labels) of samples of the epoch under way, for indices on the device of resident images.

        The host neither reads a value nor copies anything, so a CUDA graph can contain this.
        """
        assert isinstance(self._images, ResidentImages)
        samples_N = self._augment.with_partners(samples_B)
        return self.augmented(self._images.select(self._positions_of(samples_N)), samples_N)

    def _positions_of(self, samples_N: Tensor) -> Tensor:
        return samples_N if self._positions is None else self._positions[samples_N]

    def _augmented(self, images_NCHW: Tensor, samples_N: Tensor) -> tuple[Tensor, Tensor]:
        images_NCHW = self._preprocess(self._augment.change_pixels(images_NCHW, samples_N))
        images_NCHW = self._augment.erase(images_NCHW, samples_N)
        labels_N = self._labels[self._positions_of(samples_N)]
        return self._augment.mix(images_NCHW, labels_N, samples_N, self._num_classes)


class EvalLoader:
    """All samples once, in order, in equal shards for all ranks; padding fills the last batches."""

    def __init__(
        self, images: Images, labels: Tensor, preprocess: Preprocess, batch_size: int, rank_info: RankInfo
    ) -> None:
        self._images = images
        self._preprocess = preprocess
        self._rank_info = rank_info
        self.labels = labels.to(rank_info.device)
        self.batch_size = min(batch_size, -(-len(labels) // rank_info.world_size))
        """images in each batch of this rank"""
        stride = self.batch_size * rank_info.world_size
        self.padded_size = -(-len(labels) // stride) * stride
        """number of samples on all ranks, padding included"""

    def with_batch_size(self, batch_size: int) -> Self:
        """Return the loader of the same samples in batches of another size."""
        return type(self)(self._images, self.labels, self._preprocess, batch_size, self._rank_info)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images, labels, indices); all ranks get the same number of batches of the same size.

        An index is the sample's position in the data set. Padding repeats the last sample, with indices from
        `len(labels)` to `padded_size - 1`.
        """
        own = torch.arange(self.padded_size).view(-1, self._rank_info.world_size, self.batch_size)[
            :, self._rank_info.rank
        ]
        samples = list(own.clamp(max=len(self.labels) - 1))
        on_device = to_device(samples, self._rank_info.device)
        indices = own.to(self._rank_info.device)
        for indices_B, samples_B, images in zip(indices, on_device, self._images.batches(samples), strict=True):
            yield self._preprocess(images), self.labels[samples_B], indices_B

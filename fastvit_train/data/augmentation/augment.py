"""Augmentation of whole batches on the device, with separate random numbers for each sample.

All random numbers of an epoch are drawn at once, from (seed, epoch); a batch picks its samples' rows. The augmentation
of a sample therefore depends neither on its position in the batch nor on the world size. Images that are mixed are
drawn from the whole training set, for the same reason.

Shape suffixes: B batch, C channels, H height, W width, N images to augment, S samples of an epoch.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augmentation import auto_augment, color, crops, erasing, mixing
from fastvit_train.data.augmentation.epoch_table import EpochTable


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Make a CPU generator whose random numbers depend only on the arguments."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class Augment:
    """The augmentation of one data set, as its configuration describes it.

    Call `start_epoch` before the first batch of each epoch.
    """

    def __init__(self, config: DataConfig, num_samples: int, seed: int, device: torch.device) -> None:
        self._config = config
        self._seed = seed
        self._num_samples = num_samples
        self._device = device
        # Alternating flip: the images flipped in even epochs are drawn once, odd epochs flip all others
        # (Jordan 2024, https://arxiv.org/abs/2404.00498).
        self._first_flips_S = torch.rand(num_samples, generator=generator(seed, "flip")) < 0.5
        self._draws: dict[str, Tensor] = {}
        self._partners = EpochTable(num_samples, device) if config.mixup or config.cutmix else None

    def start_epoch(self, epoch: int) -> None:
        """Draw the random numbers of `epoch` for all samples, into the same memory for every epoch."""
        draws = self._draw(epoch, generator(self._seed, "augment", epoch))
        if self._partners is not None:
            self._partners.fill(draws.pop("partner"))
        for name, draw in draws.items():
            self._draws.setdefault(name, torch.empty_like(draw, device=self._device)).copy_(draw)

    def _draw(self, epoch: int, stream: torch.Generator) -> dict[str, Tensor]:
        """Return the random numbers of `epoch` by what they decide, each with a row for every sample, on the CPU."""
        config, samples, draws = self._config, self._num_samples, {}

        def uniform(columns: int) -> Tensor:
            return torch.rand(samples, columns, generator=stream)

        # New draws come last: those before them, and with them older runs, stay as they were.
        if config.crop != "none":
            draws["position"] = uniform(2)
        if config.crop == "resized":
            draws["shape"] = uniform(2 * crops.CROP_TRIES)
        if config.flip == "random":
            draws["flip"] = uniform(1)[:, 0] < 0.5
        if config.flip == "alternating":
            draws["flip"] = self._first_flips_S ^ bool(epoch % 2)
        if config.cutout:
            draws["cutout"] = uniform(2)
        if config.auto_augment != "none":
            draws |= auto_augment.draw(config, samples, stream)
        if config.color_jitter:
            draws["jitter"] = uniform(3)
        if config.random_erasing:
            draws["erasing"] = uniform(erasing.DRAWS)
        if self._partners is not None:
            draws |= mixing.draw(config.mixup, config.cutmix, samples, stream)
        return draws

    def with_partners(self, samples_B: Tensor) -> Tensor:
        """Return the samples whose images a batch needs: its own and, if they are mixed, then their partners.

        Args:
            samples_B: on the device, or on the CPU.
        """
        return samples_B if self._partners is None else torch.cat((samples_B, self._partners[samples_B]))

    def change_pixels(self, images_NCHW: Tensor, samples_N: Tensor) -> Tensor:
        """Crop, flip and recolor uint8 images; returns uint8, or float32 (0 to 255) where levels are interpolated."""
        images_NCHW = self.crop_and_flip(images_NCHW, samples_N)
        if self._config.auto_augment != "none":
            rows = {name: self._draws[name][samples_N] for name in auto_augment.DRAWS}
            images_NCHW = auto_augment.augment(images_NCHW, self._config, **rows)
        if self._config.color_jitter:
            images_NCHW = color.jitter(images_NCHW, self._draws["jitter"][samples_N], self._config.color_jitter)
        return images_NCHW

    def crop_and_flip(self, images_NCHW: Tensor, samples_N: Tensor) -> Tensor:
        """Crop and flip uint8 images; returns uint8 for shifts, float32 (0 to 255) for resized crops."""
        rows = {name: self._draws[name][samples_N] for name in ("position", "shape", "flip") if name in self._draws}
        flip_N = rows.get("flip")
        if self._config.crop == "resized":
            size, scale = images_NCHW.shape[-2:], self._config.crop_scale
            boxes = crops.crop_boxes(rows["shape"], rows["position"], size, scale)
            return crops.resized_crop(images_NCHW, *boxes, flip_N)
        if self._config.crop == "shift" and self._config.shift:
            reach = 2 * self._config.shift + 1
            offsets_N2 = (rows["position"] * reach).long().clamp(max=reach - 1) - self._config.shift
            return crops.shift(images_NCHW, offsets_N2[:, 0], offsets_N2[:, 1], flip_N)
        if flip_N is None:
            return images_NCHW
        return torch.where(flip_N[:, None, None, None], images_NCHW.flip(-1), images_NCHW)

    def erase(self, images_NCHW: Tensor, samples_N: Tensor) -> Tensor:
        """Set a part of each normalised image to zero: by cutout, and by random erasing."""
        if self._config.cutout:
            images_NCHW = erasing.cutout(images_NCHW, self._draws["cutout"][samples_N], self._config.cutout)
        if self._config.random_erasing:
            draws_N = self._draws["erasing"][samples_N]
            images_NCHW = erasing.random_erasing(images_NCHW, draws_N, self._config.random_erasing)
        return images_NCHW

    def mix(self, images_NCHW: Tensor, labels_N: Tensor, samples_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix the images of a batch, and their labels, with those of their partners, which follow them.

        Args:
            images_NCHW, labels_N: images and their classes.
            samples_N: the samples, as `with_partners` returns them.
            num_classes: number of the model's outputs.

        Returns:
            The images, and their classes, int64 (batch,); or, if images are mixed, the share of each class, float32
            (batch, classes).
        """
        if self._partners is None:
            return images_NCHW, labels_N
        own_BCHW, partner_BCHW = images_NCHW.chunk(2)
        samples_B, _ = samples_N.chunk(2)
        share_B, is_cut_B, center_B2 = (self._draws[name][samples_B] for name in ("share", "is_cut", "center"))
        weight_BHW = mixing.pixel_weights(share_B, is_cut_B, center_B2, own_BCHW.shape[-2:])
        own_BK, partner_BK = F.one_hot(labels_N, num_classes).float().chunk(2)
        images_BCHW = partner_BCHW.lerp(own_BCHW, weight_BHW[:, None])
        return images_BCHW, partner_BK.lerp(own_BK, weight_BHW.mean((1, 2))[:, None])

"""Augmentation of whole batches on the device, with separate random numbers for each sample.

All random numbers of an epoch are drawn at once, from (seed, epoch); a batch picks its samples' rows. The augmentation
of a sample therefore depends neither on its position in the batch nor on the world size.

Shape suffixes: B batch, C channels, H height, W width, R rows of all channels, S samples of the data set, T tries.
"""

import hashlib
import math

import torch
from torch import Tensor

from fastvit_train.config.schema import DataConfig

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)


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

    def start_epoch(self, epoch: int) -> None:
        """Draw the random numbers of `epoch` for all samples, into the same memory for every epoch."""
        config, draws = self._config, {}
        stream = generator(self._seed, "augment", epoch)

        def uniform(columns: int) -> Tensor:
            return torch.rand(self._num_samples, columns, generator=stream)

        if config.crop != "none":
            draws["position"] = uniform(2)
        if config.crop == "resized":
            draws["shape"] = uniform(2 * CROP_TRIES)
        if config.flip == "random":
            draws["flip"] = uniform(1)[:, 0] < 0.5
        if config.flip == "alternating":
            draws["flip"] = self._first_flips_S ^ bool(epoch % 2)
        if config.cutout:
            draws["cutout"] = uniform(2)
        for name, draw in draws.items():
            self._draws.setdefault(name, torch.empty_like(draw, device=self._device)).copy_(draw)

    def crop_and_flip(self, images_BCHW: Tensor, samples_B: Tensor) -> Tensor:
        """Crop and flip uint8 images; returns uint8 for shifts, float32 (0 to 255) for resized crops."""
        rows = {name: draw[samples_B] for name, draw in self._draws.items()}
        flip_B = rows.get("flip")
        if self._config.crop == "resized":
            boxes = crop_boxes(rows["shape"], rows["position"], images_BCHW.shape[-2:], self._config.crop_scale)
            return resized_crop(images_BCHW, *boxes, flip_B)
        if self._config.crop == "shift" and self._config.shift:
            reach = 2 * self._config.shift + 1
            offsets_B2 = (rows["position"] * reach).long().clamp(max=reach - 1) - self._config.shift
            return shift(images_BCHW, offsets_B2[:, 0], offsets_B2[:, 1], flip_B)
        if flip_B is None:
            return images_BCHW
        return torch.where(flip_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)

    def cutout(self, images_BCHW: Tensor, samples_B: Tensor) -> Tensor:
        """Set a square of each normalised image to zero (DeVries & Taylor 2017); it may reach over the border."""
        if not self._config.cutout:
            return images_BCHW
        height, width = images_BCHW.shape[-2:]
        centre_B2 = self._draws["cutout"][samples_B]
        inside_BH = _in_square(centre_B2[:, 0], height, self._config.cutout)
        inside_BW = _in_square(centre_B2[:, 1], width, self._config.cutout)
        return images_BCHW.masked_fill((inside_BH[:, :, None] & inside_BW[:, None, :])[:, None], 0.0)


def _in_square(centre_B: Tensor, length: int, side: int) -> Tensor:
    first_B = (centre_B * length).long().clamp(max=length - 1) - side // 2
    offset = torch.arange(length, device=centre_B.device) - first_B[:, None]
    return (offset >= 0) & (offset < side)


def shift(images_BCHW: Tensor, down_B: Tensor, right_B: Tensor, flip_B: Tensor | None = None) -> Tensor:
    """Shift each image's window by `down` and `right` pixels, with reflected borders, and flip those in `flip`."""
    height, width = images_BCHW.shape[-2:]
    rows_BH = _reflect(torch.arange(height, device=down_B.device) + down_B[:, None], height)
    columns_BW = _reflect(torch.arange(width, device=right_B.device) + right_B[:, None], width)
    if flip_B is not None:
        columns_BW = torch.where(flip_B[:, None], columns_BW.flip(1), columns_BW)
    pixels_B1P = (rows_BH[:, :, None] * width + columns_BW[:, None, :]).flatten(1).unsqueeze(1)
    flat_BCP = images_BCHW.flatten(2)
    return flat_BCP.gather(2, pixels_B1P.expand(-1, flat_BCP.shape[1], -1)).view_as(images_BCHW)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Mirror indices outside 0 .. length - 1 at the borders, at any distance, without repeating the border pixel."""
    if length == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * (length - 1))
    return torch.minimum(index, 2 * (length - 1) - index)


def crop_boxes(
    shapes_BT: Tensor, positions_B2: Tensor, size: torch.Size, min_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw boxes (top, left, height, width), each (batch,), with the distribution of torchvision's RandomResizedCrop.

    Each image takes the first of ten tries that fits, or else the largest central box with an allowed aspect ratio.
    """
    image_height, image_width = size
    area = image_height * image_width * (min_scale + (1 - min_scale) * shapes_BT[:, :CROP_TRIES])
    log_ratio = (math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
    ratio = (log_ratio[0] + (log_ratio[1] - log_ratio[0]) * shapes_BT[:, CROP_TRIES:]).exp()
    widths_BT, heights_BT = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits_BT = (widths_BT <= image_width) & (heights_BT <= image_height) & (widths_BT > 0) & (heights_BT > 0)
    first_B1 = fits_BT.int().argmax(1, keepdim=True)
    any_B = fits_BT.any(1)
    fallback_height = min(image_height, round(image_width / CROP_RATIO[0]))
    fallback_width = min(image_width, round(image_height * CROP_RATIO[1]))
    height_B = heights_BT.gather(1, first_B1)[:, 0].where(any_B, fallback_height)
    width_B = widths_BT.gather(1, first_B1)[:, 0].where(any_B, fallback_width)
    room_B2 = torch.stack((image_height - height_B, image_width - width_B), 1)
    corner_B2 = torch.minimum((positions_B2 * (room_B2 + 1)).long(), room_B2)
    corner_B2 = torch.where(any_B[:, None], corner_B2, room_B2 // 2)
    return corner_B2[:, 0], corner_B2[:, 1], height_B, width_B


def resized_crop(
    images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, height_B: Tensor, width_B: Tensor, flip_B: Tensor | None
) -> Tensor:
    """Resize each image's box to the image's size with bilinear interpolation; returns float32, 0 to 255.

    Bilinear interpolation is separable, so it is computed as two batched products with interpolation matrices.
    """
    rows_BHH = _interpolation(top_B, height_B, images_BCHW.shape[-2])
    columns_BWW = _interpolation(left_B, width_B, images_BCHW.shape[-1], flip_B)
    # The channels of an image share its matrices; of both products, only the second needs a copy of them per channel.
    resized_BRW = torch.bmm(images_BCHW.flatten(1, 2).float(), columns_BWW.transpose(1, 2))
    return rows_BHH[:, None] @ resized_BRW.view_as(images_BCHW)


def _interpolation(start_B: Tensor, length_B: Tensor, size: int, flip_B: Tensor | None = None) -> Tensor:
    """Return weights (batch, size, size): [b, i, j] is that of input pixel j in output pixel i (centres at i + 0.5)."""
    pixels = torch.arange(size, device=start_B.device)
    source_BS = (pixels + 0.5) * (length_B / size)[:, None] - 0.5
    source_BS = start_B[:, None] + source_BS.clamp(min=0).minimum(length_B[:, None] - 1)
    if flip_B is not None:
        source_BS = torch.where(flip_B[:, None], source_BS.flip(1), source_BS)
    return (source_BS[:, :, None] - pixels).abs_().neg_().add_(1).clamp_(min=0)

"""TrivialAugment and RandAugment for whole batches: each image gets its own operations and strengths.

The operations, and how a bin of 31 becomes a strength, are torchvision's. All images take part in each operation: the
strength is zero for those that get another one.

Sources: Müller & Hutter 2021 (https://arxiv.org/abs/2103.10158); Cubuk et al. 2019 (https://arxiv.org/abs/1909.13719).

Shape suffixes: B batch, C channels, H height, W width, P pixels of a channel, L the 256 levels of a pixel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.augmentation.color import blend, gray

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
NUM_BINS = 31
LEVELS = 256
DRAWS = ("operation", "bin", "negative")


@dataclass(frozen=True)
class Space:
    """The strengths of the operations, for images of one size."""

    shear: float
    """largest shift of a row or column, in multiples of its distance from the corner"""
    translate_x: float
    """largest translation in pixels"""
    translate_y: float
    rotate: float
    """largest angle in degrees"""
    blend: float
    """largest change of brightness, color, contrast and sharpness, as a fraction"""
    posterize: int
    """largest number of bits of a level that are lost"""


def trivial_space(height: int, width: int) -> Space:
    """Return the strengths of TrivialAugment's wide space, which do not depend on the size."""
    return Space(0.99, 32.0, 32.0, 135.0, 0.99, 6)


def rand_space(height: int, width: int) -> Space:
    """Return the strengths of RandAugment."""
    return Space(0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4)


def draw(config: DataConfig, samples: int, stream: torch.Generator) -> dict[str, Tensor]:
    """Draw the operations of each sample, their strengths and signs: a row of one or more columns for each."""
    shape = (samples, 1 if config.auto_augment == "trivial" else config.rand_ops)
    operation = torch.randint(len(OPERATIONS), shape, generator=stream)
    bins = torch.randint(NUM_BINS, shape, generator=stream)
    negative = torch.rand(shape, generator=stream) < 0.5
    bins = bins if config.auto_augment == "trivial" else torch.full(shape, config.rand_magnitude)
    return {"operation": operation, "bin": bins, "negative": negative}


def augment(images_BCHW: Tensor, config: DataConfig, operation: Tensor, bin: Tensor, negative: Tensor) -> Tensor:
    """Apply to each image the operations that were drawn for it, one after another; returns uint8."""
    images_BCHW = images_BCHW if images_BCHW.dtype == torch.uint8 else images_BCHW.round().to(torch.uint8)
    space = (trivial_space if config.auto_augment == "trivial" else rand_space)(*images_BCHW.shape[-2:])
    for column in range(operation.shape[1]):
        images_BCHW = apply(images_BCHW, operation[:, column], bin[:, column], negative[:, column], space)
    return images_BCHW


def apply(images_BCHW: Tensor, operation_B: Tensor, bin_B: Tensor, negative_B: Tensor, space: Space) -> Tensor:
    """Apply to each image the operation with its index in `OPERATIONS`.

    Args:
        images_BCHW: uint8, of one or three channels.
        operation_B: indices, int64.
        bin_B: strengths, from 0 to 30, int64.
        negative_B: whether a shear, translation, rotation or change goes the other way, bool.
        space: the strengths of the largest bin.

    Returns:
        The images, uint8.
    """
    strengths = Strengths(operation_B, bin_B, negative_B)
    images_BCHW = _warp(images_BCHW, strengths, space)
    images_BCHW = _map_levels(images_BCHW, strengths, space)
    return _move_from_base(images_BCHW, strengths, space)


@dataclass(frozen=True)
class Strengths:
    """The operation of each image, and how strong it is."""

    operation_B: Tensor
    bin_B: Tensor
    negative_B: Tensor

    def is_(self, name: str) -> Tensor:
        """Return which images this operation is for, (batch,)."""
        return self.operation_B == OPERATIONS.index(name)

    def of(self, name: str, largest: float) -> Tensor:
        """Return the signed strength of an operation, (batch,): 0 for the images of all others."""
        strength_B = torch.linspace(0, largest, NUM_BINS, device=self.bin_B.device)[self.bin_B]
        return torch.where(self.is_(name), torch.where(self.negative_B, -strength_B, strength_B), 0.0)


def _warp(images_BCHW: Tensor, strengths: Strengths, space: Space) -> Tensor:
    """Shear, translate or rotate each image; a pixel is the nearest one, or black if it is from outside."""
    height, width = images_BCHW.shape[-2:]
    angle_B = strengths.of("rotate", math.radians(space.rotate))
    shear_x_B, shear_y_B = strengths.of("shear_x", space.shear), strengths.of("shear_y", space.shear)
    # Whole pixels, as in torchvision. Shears leave the upper left corner where it is, and rotations the center.
    move_x_B = shear_x_B * (height / 2) - strengths.of("translate_x", space.translate_x).trunc()
    move_y_B = shear_y_B * (width / 2) - strengths.of("translate_y", space.translate_y).trunc()
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    x_W = torch.arange(width, device=angle_B.device) - (width - 1) / 2  # from the center
    y_H = torch.arange(height, device=angle_B.device) - (height - 1) / 2
    from_x_BHW = _plane(cos_B, shear_x_B - sin_B, move_x_B + (width - 1) / 2, x_W, y_H)
    from_y_BHW = _plane(shear_y_B + sin_B, cos_B, move_y_B + (height - 1) / 2, x_W, y_H)
    inside_BHW = (from_x_BHW >= 0) & (from_x_BHW < width) & (from_y_BHW >= 0) & (from_y_BHW < height)
    pixels_BP = (from_y_BHW * width + from_x_BHW).clamp(0, height * width - 1).flatten(1)
    flat_BCP = images_BCHW.flatten(2)
    moved_BCP = flat_BCP.gather(2, pixels_BP[:, None].expand(-1, flat_BCP.shape[1], -1))
    return moved_BCP.view_as(images_BCHW).masked_fill(~inside_BHW[:, None], 0)


def _plane(by_x_B: Tensor, by_y_B: Tensor, offset_B: Tensor, x_W: Tensor, y_H: Tensor) -> Tensor:
    """Return by_x * x + by_y * y + offset, rounded, int64 (batch, height, width)."""
    along_BHW = by_x_B[:, None, None] * x_W + (by_y_B[:, None] * y_H + offset_B[:, None])[:, :, None]
    return along_BHW.round().long()


def _map_levels(images_BCHW: Tensor, strengths: Strengths, space: Space) -> Tensor:
    """Apply the operations that replace each level of a channel by another one, by a table for each image."""
    levels_L = torch.arange(LEVELS, dtype=torch.float32, device=images_BCHW.device)
    brightness_B11 = _column(1 + strengths.of("brightness", space.blend))
    contrast_B11 = _column(1 + strengths.of("contrast", space.blend))
    mean_B11 = _column(gray(images_BCHW).float().mean((1, 2, 3)))
    blended_BCL = (brightness_B11 * levels_L).clamp(max=LEVELS - 1)
    blended_BCL = torch.where(
        _column(strengths.is_("contrast")), contrast_B11 * levels_L + (1 - contrast_B11) * mean_B11, blended_BCL
    )
    step_B11 = _column(2 ** (strengths.bin_B * (space.posterize / (NUM_BINS - 1))).round())
    threshold_B11 = _column((LEVELS - 1) - strengths.bin_B * ((LEVELS - 1) / (NUM_BINS - 1)))
    for name, mapped_BCL in (
        ("posterize", levels_L - levels_L % step_B11),
        ("solarize", torch.where(levels_L >= threshold_B11, LEVELS - 1 - levels_L, levels_L)),
        ("autocontrast", _stretched(images_BCHW, levels_L)),
        ("equalize", _equalized(images_BCHW, levels_L)),
    ):
        blended_BCL = torch.where(_column(strengths.is_(name)), mapped_BCL, blended_BCL)
    table_BCL = blended_BCL.clamp(0, LEVELS - 1).to(torch.uint8).expand(-1, images_BCHW.shape[1], -1)
    return table_BCL.gather(2, images_BCHW.flatten(2).long()).view_as(images_BCHW)


def _column(values_B: Tensor) -> Tensor:
    return values_B[:, None, None]


def _stretched(images_BCHW: Tensor, levels_L: Tensor) -> Tensor:
    """Return the table of autocontrast, (batch, channels, levels): each channel's levels reach from 0 to 255."""
    low_BC1, high_BC1 = (edge(images_BCHW.flatten(2), 2, keepdim=True).float() for edge in (torch.amin, torch.amax))
    return torch.where(high_BC1 > low_BC1, (levels_L - low_BC1) * ((LEVELS - 1) / (high_BC1 - low_BC1)), levels_L)


def _equalized(images_BCHW: Tensor, levels_L: Tensor) -> Tensor:
    """Return the table of equalize, (batch, channels, levels): all levels become about equally frequent, as in PIL."""
    flat_BCP = images_BCHW.flatten(2).long()
    ones_BCP = torch.ones_like(flat_BCP, dtype=torch.float32)  # counts are exact in float32
    counts_BCL = ones_BCP.new_zeros(*flat_BCP.shape[:2], LEVELS).scatter_add_(2, flat_BCP, ones_BCP)
    of_highest_BC1 = counts_BCL.gather(2, flat_BCP.amax(2, keepdim=True))
    step_BC1 = ((flat_BCP.shape[2] - of_highest_BC1) / (LEVELS - 1)).floor()
    below_BCL = counts_BCL.cumsum(2) - counts_BCL
    table_BCL = ((below_BCL + (step_BC1 / 2).floor()) / step_BC1).floor()
    return torch.where(step_BC1 == 0, levels_L, torch.where(levels_L == 0, 0.0, table_BCL))


def _move_from_base(images_BCHW: Tensor, strengths: Strengths, space: Space) -> Tensor:
    """Move the images of color away from their gray image, and those of sharpness from their smoothed one, or to it."""
    ratio_B = 1 + strengths.of("color", space.blend) + strengths.of("sharpness", space.blend)
    ratio_B111 = ratio_B[:, None, None, None]
    base_BCHW = torch.where(_column(strengths.is_("color"))[..., None], gray(images_BCHW), _smoothed(images_BCHW))
    return blend(images_BCHW, base_BCHW, ratio_B111).to(torch.uint8)


def _smoothed(images_BCHW: Tensor) -> Tensor:
    """Return each pixel's mean with its eight neighbors, in which it counts five times; the border is unchanged."""
    if min(images_BCHW.shape[-2:]) < 3:
        return images_BCHW
    levels_BCHW = images_BCHW.short()
    rows = levels_BCHW[..., :-2, :] + levels_BCHW[..., 1:-1, :] + levels_BCHW[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smoothed_BCHW = images_BCHW.clone()
    smoothed_BCHW[..., 1:-1, 1:-1] = ((box + 4 * levels_BCHW[..., 1:-1, 1:-1]) / 13).round()
    return smoothed_BCHW

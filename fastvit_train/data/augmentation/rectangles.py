"""Random rectangles in the images of a batch: the first of several tries that fits, and masks.

Shape suffixes: B batch, H height, L pixels of a side, T tries, W width.
"""

import math

import torch
from torch import Tensor


def draw_sides(
    areas_BT: Tensor, ratios_BT: Tensor, pixels: int, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return two sides in whole pixels, float32 (batch, tries); the first one over the second one is the ratio.

    Args:
        areas_BT, ratios_BT: random numbers from 0 to 1.
        pixels: number of pixels of the image.
        area: range of the areas, as fractions of the image; they are uniform.
        ratio: range of the ratios; their logarithms are uniform.
    """
    area_BT = pixels * (area[0] + (area[1] - area[0]) * areas_BT)
    low, high = (math.log(bound) for bound in ratio)
    ratio_BT = (low + (high - low) * ratios_BT).exp()
    return (area_BT * ratio_BT).sqrt().round(), (area_BT / ratio_BT).sqrt().round()


def take_first(fits_BT: Tensor, *values_BT: Tensor) -> tuple[Tensor, ...]:
    """Return whether any try fits, and each of the values for the first try that does, all (batch,)."""
    first_B1 = fits_BT.int().argmax(1, keepdim=True)
    return fits_BT.any(1), *(value_BT.gather(1, first_B1)[:, 0] for value_BT in values_BT)


def interval_around(center_B: Tensor, length: int, extent_B: Tensor | int) -> Tensor:
    """Return which of `length` pixels are in an interval, bool (batch, length).

    Args:
        center_B: its center, as a fraction of the length.
        length: number of pixels.
        extent_B: its pixels, some of which may be outside of the image.
    """
    first_B = (center_B * length).long().clamp(max=length - 1) - extent_B // 2
    return interval_from(first_B, length, extent_B)


def interval_from(first_B: Tensor, length: int, extent_B: Tensor | int) -> Tensor:
    """Return which of `length` pixels are among `extent` from the pixel `first` on, bool (batch, length)."""
    offset_BL = torch.arange(length, device=first_B.device) - first_B[:, None]
    return (offset_BL >= 0) & (offset_BL < (extent_B if isinstance(extent_B, int) else extent_B[:, None]))


def rectangle(rows_BH: Tensor, columns_BW: Tensor) -> Tensor:
    """Return which pixels are in both the rows and the columns, bool (batch, height, width)."""
    return rows_BH[:, :, None] & columns_BW[:, None, :]

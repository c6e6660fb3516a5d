"""Cutout and random erasing: set a part of each normalised image to zero, which is the mean color.

Shape suffixes: B batch, C channels, H height, W width, T tries.
"""

from torch import Tensor

from fastvit_train.data.augmentation.rectangles import (
    draw_sides,
    interval_around,
    interval_from,
    rectangle,
    take_first,
)

TRIES = 10  # these numbers are those of torchvision's RandomErasing
AREA = (0.02, 0.33)
RATIO = (0.3, 3.3)
DRAWS = 1 + 2 * TRIES + 2
"""random numbers per image: whether it is erased; area and ratio of each try; the position"""


def cutout(images_BCHW: Tensor, center_B2: Tensor, side: int) -> Tensor:
    """Erase a square of each image (DeVries & Taylor 2017); it may reach over the border."""
    height, width = images_BCHW.shape[-2:]
    rows_BH = interval_around(center_B2[:, 0], height, side)
    columns_BW = interval_around(center_B2[:, 1], width, side)
    return _erase(images_BCHW, rows_BH, columns_BW)


def random_erasing(images_BCHW: Tensor, draws_BD: Tensor, probability: float) -> Tensor:
    """Erase a rectangle of some images, with the distribution of torchvision's RandomErasing (Zhong et al. 2017).

    An image takes the first of ten tries that is smaller than it; if there is none, it is not erased.

    Args:
        images_BCHW: normalised images.
        draws_BD: `DRAWS` numbers from 0 to 1 for each image.
        probability: that of erasing an image.
    """
    height, width = images_BCHW.shape[-2:]
    chosen_B, areas_BT, ratios_BT, position_B2 = draws_BD.split((1, TRIES, TRIES, 2), dim=1)
    heights_BT, widths_BT = draw_sides(areas_BT, ratios_BT, height * width, AREA, RATIO)
    any_B, *sides_2B = take_first((heights_BT < height) & (widths_BT < width), heights_BT, widths_BT)
    rows_BH, columns_BW = (
        interval_from((position_B * (length - side_B + 1)).floor(), length, side_B)
        for position_B, length, side_B in zip(position_B2.unbind(1), (height, width), sides_2B, strict=True)
    )
    erased_B = (chosen_B[:, 0] < probability) & any_B
    return _erase(images_BCHW, rows_BH & erased_B[:, None], columns_BW)


def _erase(images_BCHW: Tensor, rows_BH: Tensor, columns_BW: Tensor) -> Tensor:
    return images_BCHW.masked_fill(rectangle(rows_BH, columns_BW)[:, None], 0.0)

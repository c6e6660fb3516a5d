"""Cutout and random erasing: set a part of each normalised image to zero, which is the mean color.

Shape suffixes: B batch, C channels, H height, W width, T tries.
"""

import math

import torch
from torch import Tensor

from fastvit_train.data.augmentation.mixing import within

TRIES = 10  # these numbers are those of torchvision's RandomErasing
AREA = (0.02, 0.33)
RATIO = (0.3, 3.3)
DRAWS = 1 + 2 * TRIES + 2
"""random numbers per image: whether it is erased; area and ratio of each try; the position"""


def cutout(images_BCHW: Tensor, center_B2: Tensor, side: int) -> Tensor:
    """Erase a square of each image (DeVries & Taylor 2017); it may reach over the border."""
    height, width = images_BCHW.shape[-2:]
    inside_BH = within(center_B2[:, 0], height, side)
    inside_BW = within(center_B2[:, 1], width, side)
    return _erase(images_BCHW, inside_BH, inside_BW)


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
    area_BT = height * width * (AREA[0] + (AREA[1] - AREA[0]) * areas_BT)
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio_BT = (low + (high - low) * ratios_BT).exp()
    heights_BT, widths_BT = (area_BT * ratio_BT).sqrt().round(), (area_BT / ratio_BT).sqrt().round()
    fits_BT = (heights_BT < height) & (widths_BT < width)
    first_B1 = fits_BT.int().argmax(1, keepdim=True)
    erased_B = (chosen_B[:, 0] < probability) & fits_BT.any(1)
    inside = []
    for axis, (sides_BT, length) in enumerate(((heights_BT, height), (widths_BT, width))):
        side_B = sides_BT.gather(1, first_B1)[:, 0]
        start_B = (position_B2[:, axis] * (length - side_B + 1)).floor()
        offset_BL = torch.arange(length, device=draws_BD.device) - start_B[:, None]
        inside.append((offset_BL >= 0) & (offset_BL < side_B[:, None]))
    return _erase(images_BCHW, inside[0] & erased_B[:, None], inside[1])


def _erase(images_BCHW: Tensor, inside_BH: Tensor, inside_BW: Tensor) -> Tensor:
    return images_BCHW.masked_fill((inside_BH[:, :, None] & inside_BW[:, None, :])[:, None], 0.0)

"""Random crops of whole batches: shifts with reflected borders, and resized crops, each with the flip in one pass.

Shape suffixes: B batch, C channels, H height, W width, R rows of all channels, S pixels of the result, T tries.
"""

import torch
from torch import Tensor

from fastvit_train.data.augmentation.rectangles import draw_sides, take_first

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)


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
    areas_BT, ratios_BT = shapes_BT.split(CROP_TRIES, dim=1)
    widths_BT, heights_BT = draw_sides(areas_BT, ratios_BT, image_height * image_width, (min_scale, 1), CROP_RATIO)
    fits_BT = (widths_BT <= image_width) & (heights_BT <= image_height) & (widths_BT > 0) & (heights_BT > 0)
    any_B, height_B, width_B = take_first(fits_BT, heights_BT.long(), widths_BT.long())
    fallback_height = min(image_height, round(image_width / CROP_RATIO[0]))
    fallback_width = min(image_width, round(image_height * CROP_RATIO[1]))
    height_B, width_B = height_B.where(any_B, fallback_height), width_B.where(any_B, fallback_width)
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

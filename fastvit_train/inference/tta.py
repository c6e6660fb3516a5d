"""Test-time augmentation: the mean of the predictions for several views of each image."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastvit_train.data.augmentation.crops import shift

TTA = Literal["none", "flip", "shift"]
SHIFTS = ((0, 0), (-1, -1), (1, 1))
"""pixels down and to the right"""


class AveragedViews(nn.Module):
    """A model that returns the logarithm of the mean probabilities over the views of an image, (batch, classes).

    Args:
        model: the model.
        tta: "flip" for the image and its mirror image; "shift" for both of these, also shifted by one pixel along the
            diagonal in both directions, with reflected borders.
    """

    def __init__(self, model: nn.Module, tta: TTA) -> None:
        super().__init__()
        self.model = model
        self.shifts = SHIFTS if tta == "shift" else SHIFTS[:1]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        total = torch.zeros((), device=images_BCHW.device)
        for down, right in self.shifts:
            offset_B = torch.ones(len(images_BCHW), dtype=torch.int64, device=images_BCHW.device)
            moved_BCHW = shift(images_BCHW, down * offset_B, right * offset_B)
            for view_BCHW in (moved_BCHW, moved_BCHW.flip(-1)):
                total = total + self.model(view_BCHW).float().softmax(1)
        return (total / (2 * len(self.shifts))).log()

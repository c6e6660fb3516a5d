"""Positions of the tokens: fixed, or by convolutions.

Shape suffixes: B batch, N tokens, D embed_dim, H rows of patches, W columns of patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvPositions(nn.Module):
    """Add to the patches' tokens a depthwise 3x3 convolution of them, on their grid; other tokens are not changed.

    The zeros around the grid tell the positions (Chu et al. 2021, https://arxiv.org/abs/2102.10882).
    """

    def __init__(self, dim: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        others = x_BND.shape[1] - self.grid_size[0] * self.grid_size[1]
        maps_BDHW = x_BND[:, others:].unflatten(1, self.grid_size).permute(0, 3, 1, 2)  # a view: channels_last
        weight = self.conv.weight.flatten(1).view_as(self.conv.weight)  # so its gradient is contiguous, as DDP needs it
        maps_BDHW = F.conv2d(maps_BDHW, weight, self.conv.bias, padding=1, groups=self.conv.groups)
        added_BND = maps_BDHW.permute(0, 2, 3, 1).flatten(1, 2)
        if not others:
            return x_BND + added_BND
        return torch.cat((x_BND[:, :others], x_BND[:, others:] + added_BND), dim=1)


def sine_positions(tokens: int, dim: int) -> Tensor:
    """Return fixed positions (tokens, dim): sine on even channels, cosine on odd ones (Vaswani et al. 2017, 3.5)."""
    channels = torch.arange(dim)
    angles = torch.arange(tokens).unsqueeze(1) / 10000 ** (2 * (channels // 2) / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())

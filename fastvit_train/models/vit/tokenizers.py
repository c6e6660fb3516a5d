"""From images to tokens: by patches, or by convolutions.

Shape suffixes: B batch, C channels, H height, W width, N tokens, K numbers in a patch.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchTokenizer(nn.Module):
    """Project non-overlapping patches to tokens."""

    def __init__(self, in_chans: int, embed_dim: int, image_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        if patch_size < 1 or any(side % patch_size for side in image_size):
            raise ValueError(
                f"image size {'x'.join(map(str, image_size))} is not a multiple of patch size {patch_size}"
            )
        self.patch_size = patch_size
        self.grid_size = self.grid(image_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of an image, (height, width) in pixels."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # The kernels of `proj` do not overlap: a matrix product is faster, and its tokens are contiguous.
        (height, width), size = images_BCHW.shape[2:], self.patch_size
        rows, columns = self.grid((height, width))
        patches = images_BCHW.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        patches_BNK = patches.flatten(3).flatten(1, 2)
        return F.linear(patches_BNK, self.proj.weight.flatten(1), self.proj.bias)


class ConvTokenizer(nn.Module):
    """Compute tokens by convolutions without bias, each followed by ReLU and 3x3/2 max-pooling (CCT)."""

    def __init__(
        self, in_chans: int, embed_dim: int, image_size: tuple[int, int], kernel_size: int, num_layers: int
    ) -> None:
        super().__init__()
        stride, padding = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
        channels = [in_chans, *[64] * (num_layers - 1), embed_dim]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], kernel_size, stride, padding, bias=False) for i in range(num_layers)
        )
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.grid_size = self.grid(image_size)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of tokens of an image, (height, width) in pixels."""
        height, width = image_size
        for _ in self.convs:
            height, width = self._pooled(height), self._pooled(width)
        return height, width

    def _pooled(self, side: int) -> int:
        """Return the side of a map after a convolution and its max-pooling."""
        return ((side + 2 * self.padding - self.kernel_size) // self.stride) // 2 + 1

    def _maps(self, x_BCHW: Tensor) -> Tensor:
        for conv in self.convs:
            x_BCHW = F.max_pool2d(F.relu(conv(x_BCHW)), kernel_size=3, stride=2, padding=1)
        return x_BCHW

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._maps(images_BCHW).flatten(2).transpose(1, 2)

"""Color jitter: each image with a brightness, a contrast and a saturation of its own.

Shape suffixes: B batch, C channels, H height, W width.
"""

from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)
"""weights of red, green and blue in the brightness of a pixel, as torchvision has them"""
MAX_LEVEL = 255


def jitter(images_BCHW: Tensor, draws_B3: Tensor, strength: float) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor from 1 - strength to 1 + strength.

    The factors are those of torchvision's ColorJitter, which draws the order too.

    Args:
        images_BCHW: levels from 0 to 255, of one or three channels.
        draws_B3: numbers from 0 to 1 for each image.
        strength: up to 1.

    Returns:
        float32 levels from 0 to 255.
    """
    images_BCHW = images_BCHW.float()
    factors_3B111 = (1 + strength * (2 * draws_B3 - 1)).T[:, :, None, None, None]
    images_BCHW = blend(images_BCHW, 0.0, factors_3B111[0])
    images_BCHW = blend(images_BCHW, gray(images_BCHW).mean((1, 2, 3), keepdim=True), factors_3B111[1])
    return blend(images_BCHW, gray(images_BCHW), factors_3B111[2])


def blend(images_BCHW: Tensor, base_BCHW: Tensor | float, factor_B111: Tensor) -> Tensor:
    """Return base + factor * (images - base), as levels from 0 to 255, float32."""
    return (factor_B111 * images_BCHW + (1 - factor_B111) * base_BCHW).clamp(0, MAX_LEVEL)


def gray(images_BCHW: Tensor) -> Tensor:
    """Return the brightness of each pixel, (batch, 1, height, width), in the images' dtype."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    red, green, blue = (weight * images_BCHW[:, i : i + 1] for i, weight in enumerate(GRAY))
    return (red + green + blue).to(images_BCHW.dtype)

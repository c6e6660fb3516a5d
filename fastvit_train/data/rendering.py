"""How a decoded file becomes an image: of one size, opaque, in red, green and blue or in gray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastvit_train.config.resolved import LUMA
from fastvit_train.config.schema import DataConfig

WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
PHOTOMETRIC, BITS_PER_SAMPLE, MIN_SAMPLE, MAX_SAMPLE = 262, 258, 340, 341
"""tags of TIFF"""
WHITE_IS_ZERO = 0
LUMA_BITS = 16
"""bits of the shares as whole numbers, which Pillow computes with"""
LUMA_BATCH = 4096
"""images that are converted at once"""

TIMM_CROP_MODES = {"crop": "center", "pad": "border", "stretch": "squash"}
"""timm's names for the values of --fit"""


@dataclass(frozen=True)
class Rendering:
    """How image files become images of one size; the settings in `DataConfig` describe it."""

    background: str = DataConfig.background
    fit: str = DataConfig.fit
    crop_pct: float = 1.0

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Return what `config` asks for."""
        return cls(config.background, config.fit, config.crop_pct or 1.0)

    @classmethod
    def of_timm(cls, entries: Mapping[str, Any]) -> Self:
        """Return what the crop mode and the crop fraction in timm's `pretrained_cfg` say."""
        modes = {mode: fit for fit, mode in TIMM_CROP_MODES.items()}
        fit = modes.get(str(entries.get("crop_mode")), cls.fit)
        return cls(fit=fit, crop_pct=min(entries.get("crop_pct") or 1.0, 1.0))

    def __str__(self) -> str:
        """Describe the resizing for those who do it elsewhere."""
        return self.describe("image_size")

    def describe(self, size: str) -> str:
        """Return what resizing does, as in "resized to cover 32 x 32 pixels"; `size` is the height and width."""
        how = "bilinear with antialiasing"
        if self.fit == "pad":
            return f"to fit into {size}, {how}; borders in {self.background}"
        if self.fit == "stretch":
            return f"to {size}, both sides on their own, {how}"
        larger = f" enlarged by 1 / {self.crop_pct:g}" if self.crop_pct < 1 else ""
        return f"to cover {size}{larger}, {how}; center crop"

    def timm_entries(self) -> dict[str, Any]:
        """Return interpolation, crop fraction and crop mode, under their names in timm's `pretrained_cfg`."""
        return {"interpolation": "bilinear", "crop_pct": self.crop_pct, "crop_mode": TIMM_CROP_MODES[self.fit]}

    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return `image` as `width` x `height` pixels."""
        size, bilinear = (width, height), Image.Resampling.BILINEAR
        if self.fit == "pad":
            return ImageOps.pad(image, size, bilinear, self.background)
        if self.fit == "stretch":
            return image.resize(size, bilinear)
        return ImageOps.fit(image, size, bilinear, bleed=(1 - self.crop_pct) / 2)


DEFAULT_RENDERING = Rendering()


def to_gray(images_BCHW: Tensor) -> Tensor:
    """Return the gray levels of uint8 RGB images, (batch, 1, height, width), as Pillow's convert("L") does."""
    red, green, blue = (round(share * 2**LUMA_BITS) for share in LUMA)

    def levels(images: Tensor) -> Tensor:
        r, g, b = images.int().split(1, dim=1)
        return (red * r + green * g + blue * b + 2 ** (LUMA_BITS - 1) >> LUMA_BITS).to(torch.uint8)

    return torch.cat([levels(part) for part in images_BCHW.split(LUMA_BATCH)])


def may_be_transparent(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent color."""
    return image.mode in WITH_ALPHA or "transparency" in image.info


def to_rgb(file: Image.Image, background: str) -> Image.Image:
    """Return a file's first image as RGB, upright, its transparent parts composed on the background."""
    extremes = black_and_white(file)
    image = ImageOps.exif_transpose(file)
    if extremes is not None:
        image = _scale(image, *extremes)
    if not may_be_transparent(image):
        return image.convert("RGB")
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def black_and_white(file: Image.Image) -> tuple[float, float] | None:
    """Return the values that are black and white if pixels have more than 8 bits, or None if convert() knows them.

    Raises:
        ValueError: if neither the format nor a tag says it.
    """
    if not file.mode.startswith(("I", "F")):
        return None
    tags = getattr(file, "tag_v2", {})
    if MIN_SAMPLE in tags and MAX_SAMPLE in tags:
        black, white = float(np.min(tags[MIN_SAMPLE])), float(np.max(tags[MAX_SAMPLE]))
    elif file.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        black, white = 0.0, 2.0**bits - 1
    elif file.format in ("PNG", "PPM"):  # 16 bits, as integers of 32 bits
        black, white = 0.0, 2.0**16 - 1
    else:
        kind = "floats" if file.mode == "F" else "signed or 32-bit integers"
        raise ValueError(f"its pixels are {kind}, and nothing says which values are black and white; use 8 or 16 bits")
    if not np.isfinite(white - black) or white <= black:
        raise ValueError(f"it says that its pixels range from {black} to {white}")
    return (white, black) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (black, white)


def _scale(image: Image.Image, black: float, white: float) -> Image.Image:
    """Return a gray image of 8 bits, which convert() would clip instead; a transparent value becomes an alpha."""
    values = np.asarray(image)
    scaled = np.nan_to_num((values.astype(np.float64) - black) * (255 / (white - black)))
    gray = Image.fromarray((scaled.clip(0, 255) + 0.5).astype(np.uint8))
    if "transparency" in image.info:
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray

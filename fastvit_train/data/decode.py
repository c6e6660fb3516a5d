"""Decode image files to RGB images of one size, and examine many files before a training."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from stat import S_ISREG
from typing import Self, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastvit_train.config.schema import DataConfig
from fastvit_train.utils import machine
from fastvit_train.utils.errors import UserError

# Pillow would try every format that it knows, and start another program to read PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 89_478_485  # Pillow's own limit, above which it warns: 256 MiB as RGB
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""by format, bytes near the end of a complete file and nowhere else in its pixels"""
TAIL_BYTES = 1024
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
PHOTOMETRIC, BITS_PER_SAMPLE, MIN_SAMPLE, MAX_SAMPLE = 262, 258, 340, 341
"""tags of TIFF"""
WHITE_IS_ZERO = 0
MISSING = "it does not exist"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Unreadable:
    """A file that can't be decoded, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        if self.reason == MISSING:
            return f"{self.path} does not exist; check its spelling"
        return f"{self.path} can't be decoded ({self.reason}); replace or remove the file"


@dataclass(frozen=True)
class Rendering:
    """How image files become square images; the settings in `DataConfig` describe it."""

    background: str = DataConfig.background
    fit: str = DataConfig.fit
    crop_pct: float = 1.0

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """Return what `config` asks for."""
        return cls(config.background, config.fit, config.crop_pct or 1.0)

    def __str__(self) -> str:
        """Describe the resizing for those who do it elsewhere; `image_size` is the side in pixels."""
        how = "bilinear with antialiasing"
        if self.fit == "pad":
            return f"longer side to image_size, {how}; borders in {self.background}"
        if self.fit == "stretch":
            return f"both sides to image_size, {how}"
        larger = f" / {self.crop_pct:g}" if self.crop_pct < 1 else ""
        return f"shorter side to image_size{larger}, {how}; center crop"

    def resize(self, image: Image.Image, size: int) -> Image.Image:
        """Return `image` as `size` x `size` pixels."""
        square, bilinear = (size, size), Image.Resampling.BILINEAR
        if self.fit == "pad":
            return ImageOps.pad(image, square, bilinear, self.background)
        if self.fit == "stretch":
            return image.resize(square, bilinear)
        return ImageOps.fit(image, square, bilinear, bleed=(1 - self.crop_pct) / 2)


@dataclass(frozen=True)
class ImageFiles:
    """Paths of image files, and how they become images."""

    paths: Sequence[Path]
    rendering: Rendering = Rendering()

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, samples: Sequence[int]) -> "ImageFiles":
        """Return these files only."""
        return ImageFiles([self.paths[i] for i in samples], self.rendering)


def decode(path: Path, image_size: int, rendering: Rendering = Rendering()) -> Tensor:
    """Decode an image file to uint8 (3, image_size, image_size).

    Args:
        path: the file; the first image in it is taken, and turned upright.
        image_size: side in pixels.
        rendering: how it becomes square and opaque.

    Raises:
        UserError: if the file is missing, truncated, too large or not an image, or if nothing says which of its values
            are black and white; the message names it.
    """
    image = try_decode(path, image_size, rendering)
    if isinstance(image, Unreadable):
        raise UserError(str(image))
    return image


def try_decode(path: Path, image_size: int, rendering: Rendering) -> Tensor | Unreadable:
    """Decode an image file as `decode` does, or return why it can't be decoded."""
    with warnings.catch_warnings(action="ignore"):
        return _try_decode(path, image_size, rendering)


def try_decode_all(files: ImageFiles, image_size: int) -> list[Tensor | Unreadable]:
    """Decode image files in threads, as `try_decode` does."""
    return _map_in_threads(_try_decode, files.paths, repeat(image_size), repeat(files.rendering))


def decode_all(files: ImageFiles, image_size: int) -> Tensor:
    """Decode image files in threads, as `decode` does; returns uint8 (files, 3, image_size, image_size)."""
    images = try_decode_all(files, image_size)
    for image in images:
        if isinstance(image, Unreadable):
            raise UserError(str(image))
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def examine(paths: Sequence[Path]) -> tuple[list[Unreadable], int]:
    """Look at the headers and the ends of image files. Files that may be incomplete are decoded to find out.

    Returns:
        The files that can't be decoded, and the number of images that may have transparent parts.
    """
    results = _map_in_threads(_examine, paths)
    return [result for result in results if isinstance(result, Unreadable)], results.count(True)


def count_transparent(paths: Sequence[Path]) -> int:
    """Return the number of images that may have transparent parts; files that can't be read don't count."""
    return sum(_map_in_threads(_is_transparent, paths))


def describe_transparency(count: int, background: str) -> str:
    """Return a line about images that may have transparent parts; empty if there are none."""
    if not count:
        return ""
    subject, object_ = ("1 image has", "it is") if count == 1 else (f"{count:,} images have", "they are")
    return f"{subject} an alpha channel or a transparent color; {object_} composed on {background}"


def _map_in_threads(function: Callable[..., Result], *arguments: Iterable[object]) -> list[Result]:
    """Return the results of a function that reads image files, without Pillow's warnings."""
    # Python's catch_warnings is not made for threads, so it is entered once for all of them.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(machine.usable_cores()) as pool:
        return list(pool.map(function, *arguments))


def _try_decode(path: Path, image_size: int, rendering: Rendering) -> Tensor | Unreadable:
    try:
        with _open(path) as file:
            image = _to_rgb(file, rendering.background)
        if image.size != (image_size, image_size) or rendering.crop_pct < 1:
            image = rendering.resize(image, image_size)
    except Exception as error:  # Pillow raises errors of any kind for damaged files, MemoryError among them
        return Unreadable(path, _reason(path, error))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _examine(path: Path) -> bool | Unreadable:
    """Return whether the image may have transparent parts, or why the file can't be decoded."""
    try:
        with _open(path) as file:
            if not _looks_complete(path, str(file.format)):
                file.load()
            return _may_be_transparent(file)
    except Exception as error:
        return Unreadable(path, _reason(path, error))


def _is_transparent(path: Path) -> bool:
    with suppress(Exception), _open(path) as file:
        return _may_be_transparent(file)
    return False


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it links to a file that does not exist" if path.is_symlink() else MISSING
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image file. The size and the values in its header are checked before it is decoded."""
    stat = path.stat()
    if not S_ISREG(stat.st_mode) or stat.st_size > MAX_FILE_BYTES:
        raise ValueError(f"not a regular file of at most {MAX_FILE_BYTES:,} bytes")
    with Image.open(path, formats=FORMATS) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are allowed")
        _black_and_white(file)
        yield file


def _looks_complete(path: Path, image_format: str) -> bool:
    if image_format not in ENDINGS:
        return False
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return ENDINGS[image_format] in stream.read()


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in WITH_ALPHA or "transparency" in image.info


def _to_rgb(file: Image.Image, background: str) -> Image.Image:
    """Return a file's first image as RGB, upright, its transparent parts composed on the background."""
    black_and_white = _black_and_white(file)
    image = ImageOps.exif_transpose(file)
    if black_and_white is not None:
        image = _scale(image, *black_and_white)
    if not _may_be_transparent(image):
        return image.convert("RGB")
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _black_and_white(file: Image.Image) -> tuple[float, float] | None:
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

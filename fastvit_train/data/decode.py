"""Decode image files to images of one size, and examine many files before a training."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import SEEK_END
from itertools import repeat
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastvit_train.config.resolved import InputSize
from fastvit_train.data.encoded import Source
from fastvit_train.data.rendering import DEFAULT_RENDERING, Rendering, black_and_white, may_be_transparent, to_rgb
from fastvit_train.utils import machine
from fastvit_train.utils.errors import UserError

# Pillow would try every format that it knows, and start another program to read PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 89_478_485  # Pillow's own limit, above which it warns: 256 MiB as RGB
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""by format, bytes near the end of a complete file and nowhere else in its pixels"""
TAIL_BYTES = 1024
MISSING = "it does not exist"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Unreadable:
    """A file that can't be decoded, and why."""

    path: Source
    reason: str

    def __str__(self) -> str:
        if self.reason == MISSING:
            return f"{self.path} does not exist; check its spelling"
        return f"{self.path} can't be decoded ({self.reason}); replace or remove the file"


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images, and how they become images."""

    paths: Sequence[Source]
    rendering: Rendering = DEFAULT_RENDERING

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, samples: Sequence[int]) -> "ImageFiles":
        """Return these files only."""
        return ImageFiles([self.paths[i] for i in samples], self.rendering)


def decode(path: Source, input_size: InputSize, rendering: Rendering = DEFAULT_RENDERING) -> Tensor:
    """Decode an image file to uint8 (channels, height, width).

    Args:
        path: the file; the first image in it is taken, and turned upright.
        input_size: channels, height and width.
        rendering: how it becomes opaque, and of that size.

    Raises:
        UserError: if the file is missing, truncated, too large or not an image, or if nothing says which of its values
            are black and white; the message names it.
    """
    image = try_decode(path, input_size, rendering)
    if isinstance(image, Unreadable):
        raise UserError(str(image))
    return image


def try_decode(path: Source, input_size: InputSize, rendering: Rendering) -> Tensor | Unreadable:
    """Decode an image file as `decode` does, or return why it can't be decoded."""
    with warnings.catch_warnings(action="ignore"):
        return _try_decode(path, input_size, rendering)


def try_decode_all(files: ImageFiles, input_size: InputSize) -> list[Tensor | Unreadable]:
    """Decode image files in threads, as `try_decode` does."""
    return _map_in_threads(_try_decode, files.paths, repeat(input_size), repeat(files.rendering))


def decode_all(files: ImageFiles, input_size: InputSize) -> Tensor:
    """Decode image files in threads, as `decode` does; returns uint8 (files, *input_size)."""
    images = try_decode_all(files, input_size)
    for image in images:
        if isinstance(image, Unreadable):
            raise UserError(str(image))
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def examine(paths: Sequence[Source]) -> tuple[list[Unreadable], int]:
    """Look at the headers and the ends of image files. Files that may be incomplete are decoded to find out.

    Returns:
        The files that can't be decoded, and the number of images that may have transparent parts.
    """
    results = _map_in_threads(_examine, paths)
    return [result for result in results if isinstance(result, Unreadable)], results.count(True)


def count_transparent(paths: Sequence[Source]) -> int:
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


def _try_decode(path: Source, input_size: InputSize, rendering: Rendering) -> Tensor | Unreadable:
    try:
        with _open(path) as file:
            image = to_rgb(file, rendering.background)
        channels, height, width = input_size
        if image.size != (width, height) or rendering.crop_pct < 1:
            image = rendering.resize(image, width, height)
        if channels == 1:
            image = image.convert("L")
    except Exception as error:  # Pillow raises errors of any kind for damaged files, MemoryError among them
        return Unreadable(path, _reason(path, error))
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def _examine(path: Source) -> bool | Unreadable:
    """Return whether the image may have transparent parts, or why the file can't be decoded."""
    try:
        with _open(path) as file:
            if not _looks_complete(path, str(file.format)):
                file.load()
            return may_be_transparent(file)
    except Exception as error:
        return Unreadable(path, _reason(path, error))


def _is_transparent(path: Source) -> bool:
    with suppress(Exception), _open(path) as file:
        return may_be_transparent(file)
    return False


def _reason(path: Source, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        is_link = isinstance(path, Path) and path.is_symlink()
        return "it links to a file that does not exist" if is_link else MISSING
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextmanager
def _open(path: Source) -> Iterator[Image.Image]:
    """Open an image file. The sizes and the values in its header are checked before it is decoded."""
    if isinstance(path, Path):
        _check_file(S_ISREG(path.stat().st_mode))  # before it is opened: a pipe would wait
    with path.open("rb") as stream:
        _check_file(stream.seek(0, SEEK_END) <= MAX_FILE_BYTES)
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are allowed")
            black_and_white(file)
            yield file


def _check_file(is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"not a regular file of at most {MAX_FILE_BYTES:,} bytes")


def _looks_complete(path: Source, image_format: str) -> bool:
    if image_format not in ENDINGS:
        return False
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, SEEK_END) - TAIL_BYTES))
        return ENDINGS[image_format] in stream.read()

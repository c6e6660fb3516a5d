"""Images in batches: from a tensor on the device, or from files that worker processes decode."""

import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastvit_train.distributed.env import local_world_size
from fastvit_train.utils.errors import UserError

# Pillow would try every format that it knows, and start another program to read PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 89_478_485  # Pillow's own limit, above which it warns: 256 MiB as RGB


class Images(Protocol):
    """A source of images, all of the same size."""

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield, for each tensor of sample indices, the images, uint8 (batch, 3, height, width), on the device.

        Args:
            samples: tensors of equal length, on the CPU.
        """
        ...


class ResidentImages:
    """Images in one uint8 tensor on the device."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images.to(device)

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        for samples_B in to_device(samples, self._images.device):
            yield self._images.index_select(0, samples_B)


def to_device(samples: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy all sample indices to the device at once; a copy per batch would make the host wait each time."""
    return torch.stack(list(samples)).to(device).unbind() if samples else ()


class StreamedImages:
    """Image files that worker processes decode while the device computes."""

    def __init__(self, paths: Sequence[Path], image_size: int, device: torch.device) -> None:
        self._files = _Files(paths, image_size)
        self._device = device

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield as `Images.batches` does; raises UserError with the name of the first file that can't be decoded."""
        loader = DataLoader(
            self._files,
            batch_sampler=[samples_B.tolist() for samples_B in samples],
            num_workers=min(len(samples), max(1, (psutil.cpu_count(logical=False) or 1) // local_world_size())),
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # otherwise it would draw from the global one, which dropout uses
            pin_memory=self._device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise UserError(batch.message, on_all_ranks=False)
            yield batch.to(self._device, non_blocking=True)


def _ignore_signals(worker: int) -> None:
    """Ignore the signals that ask a run to stop: it needs its batches until the end of the step."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Unreadable:
    """Carries the message of a decoding error out of a worker; a raised error would arrive with a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Files(Dataset):
    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self._paths = paths
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor | _Unreadable:
        try:
            return decode(self._paths[index], self._image_size)
        except UserError as error:
            return _Unreadable(str(error))


def _collate(items: list[Tensor | _Unreadable]) -> Tensor | _Unreadable:
    for item in items:
        if isinstance(item, _Unreadable):
            return item
    return default_collate(items)


def decode(path: Path, image_size: int) -> Tensor:
    """Decode an image file to uint8 (3, image_size, image_size): resize the shorter side, crop the centre.

    Raises:
        UserError: if the file is missing, truncated, too large or not an image; the message names it.
    """
    try:
        image = _open(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check its spelling") from None
    except Exception as error:  # Pillow raises errors of any kind for damaged files, MemoryError among them
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be decoded ({reason}); replace or remove the file") from None
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open(path: Path) -> Image.Image:
    """Return the file's first image as RGB, upright. The size in its header is checked before it is decoded."""
    stat = path.stat()
    if not S_ISREG(stat.st_mode) or stat.st_size > MAX_FILE_BYTES:
        raise ValueError(f"not a regular file of at most {MAX_FILE_BYTES:,} bytes")
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are allowed")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # convert() would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    return image.convert("RGB")

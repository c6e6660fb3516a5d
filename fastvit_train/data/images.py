"""Where a set's images come from, batch by batch: memory on the device, or files decoded on the way."""

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

from fastvit_train.distributed.env import local_processes
from fastvit_train.utils.errors import UserError

# Left to itself, Pillow tries all that it knows, and hands PostScript to another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 29
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MiB of RGB


class Images(Protocol):
    """A set of images of one size."""

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each tensor of sample indices their images, uint8 (batch, 3, height, width), on the device.

        The tensors are of one size and on the CPU.
        """
        ...


class ResidentImages:
    """All images in one uint8 tensor on the device."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self._images = images.to(device)

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        for samples_B in to_device(samples, self._images.device):
            yield self._images.index_select(0, samples_B)


def to_device(samples: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Sample indices on the device, moved at once: a copy for each batch would make the host wait each time."""
    return torch.stack(list(samples)).to(device).unbind() if samples else ()


class StreamedImages:
    """Image files, decoded in worker processes while the device computes."""

    def __init__(self, paths: Sequence[Path], image_size: int, device: torch.device) -> None:
        self._files = _Files(paths, image_size)
        self._device = device

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Raises UserError naming the first file that can't be decoded."""
        loader = DataLoader(
            self._files,
            batch_sampler=[samples_B.tolist() for samples_B in samples],
            num_workers=min(len(samples), max(1, (psutil.cpu_count(logical=False) or 1) // local_processes())),
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader draws from the global stream, which dropout uses too
            pin_memory=self._device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise UserError(batch.message, on_all_ranks=False)
            yield batch.to(self._device, non_blocking=True)


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group asks the run to stop, which needs its batches until the step's end."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Unreadable:
    """Carries a decoding error out of a worker; raised there, it would arrive wrapped in a traceback."""

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
    """An image file as uint8 (3, image_size, image_size): shorter side resized, centre cut out.

    Raises:
        UserError: naming the file, where it is truncated, too large or no image.
    """
    try:
        image = _open(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}; see how it is written") from None
    except Exception as error:  # a damaged file can raise anything in Pillow, running out of memory included
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be decoded ({reason}); replace or remove the file") from None
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _open(path: Path) -> Image.Image:
    """The file's first image, RGB and upright; checked by what its header says before anything is decoded."""
    stat = path.stat()
    if not S_ISREG(stat.st_mode) or stat.st_size > MAX_FILE_BYTES:
        raise ValueError(f"no regular file of up to {MAX_FILE_BYTES:,} bytes")
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels; allowed are {MAX_PIXELS:,} in all")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # convert() would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    return image.convert("RGB")

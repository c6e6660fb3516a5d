"""Images in batches, from a tensor on the device or from files that worker processes decode; and their cache."""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fastvit_train.config.resolved import InputSize
from fastvit_train.data.decode import ImageFiles, Unreadable, try_decode, try_decode_all
from fastvit_train.distributed import worker_processes
from fastvit_train.distributed.env import is_rank0
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError

log = logging.getLogger(__name__)
MAX_WITHOUT_WORKERS = 512
"""images that are decoded by threads of this process, because starting worker processes would take as long"""
CACHE_FORMAT = 2


class Images(Protocol):
    """A source of images, all of the same size."""

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield, for each tensor of sample indices, the images, uint8 (batch, channels, height, width), on the device.

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
            yield self.select(samples_B)

    def select(self, samples_B: Tensor) -> Tensor:
        """Return the images of sample indices that are on the device."""
        return self._images.index_select(0, samples_B)


def to_device(samples: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy all sample indices to the device at once; a copy per batch would make the host wait each time."""
    return torch.stack(list(samples)).to(device).unbind() if samples else ()


class StreamedImages:
    """Image files that are decoded by worker processes while the device computes, or by threads where those can't be.

    Args:
        files: the files.
        input_size: channels, height and width of the decoded images.
        device: the device that the batches are copied to.
    """

    def __init__(self, files: ImageFiles, input_size: InputSize, device: torch.device) -> None:
        self._files = _Files(files, input_size)
        self._device = device
        self._pins_memory = device.type == "cuda"
        """whether batches lie in page-locked memory: without it, a copy must end before the batch's memory is freed"""

    def batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield as `Images.batches` does; raises UserError with the name of the first file that can't be decoded."""
        for batch in self.try_batches(samples):
            if isinstance(batch, list):
                raise UserError(str(batch[0]), on_all_ranks=False)
            yield batch

    def try_batches(self, samples: Sequence[Tensor]) -> Iterator[Tensor | list[Unreadable]]:
        """Yield as `Images.batches` does, or, instead of a batch, its files that can't be decoded."""
        for batch in self._load([samples_B.tolist() for samples_B in samples]):
            yield batch if isinstance(batch, list) else batch.to(self._device, non_blocking=self._pins_memory)

    def _load(self, batches: Sequence[list[int]]) -> Iterator[Tensor | list[Unreadable]]:
        if sum(map(len, batches)) <= MAX_WITHOUT_WORKERS:
            return map(self._files.load_in_threads, batches)
        batch_bytes = self._files.input_size.nbytes * max(map(len, batches))
        reason = worker_processes.why_unavailable(batch_bytes, worker_processes.num_workers())
        if reason is None:
            try:
                return worker_processes.load_in_workers(self._files, batches, _collate, self._pins_memory)
            except OSError as error:  # such as a limit on the number of processes
                reason = f"processes that load images can't be started ({error.strerror or error})"
        _log_once(f"{reason}; this process decodes them itself, which is slower")
        return map(self._files.load_in_threads, batches)


@functools.cache
def _log_once(message: str) -> None:
    if is_rank0():
        log.warning(message)


class _Files(Dataset):
    def __init__(self, files: ImageFiles, input_size: InputSize) -> None:
        self._files = files
        self.input_size = input_size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor | Unreadable:
        """Decode an image; an error is returned, because a raised one would leave the worker with a traceback."""
        return try_decode(self._files.paths[index], self.input_size, self._files.rendering)

    def load_in_threads(self, indices: Sequence[int]) -> Tensor | list[Unreadable]:
        """Load a batch without other processes."""
        return _collate(try_decode_all(self._files.take(indices), self.input_size))


def _collate(items: list[Tensor | Unreadable]) -> Tensor | list[Unreadable]:
    return [item for item in items if isinstance(item, Unreadable)] or default_collate(items)


def cache_folder() -> Path:
    """Return the folder for what this package keeps on the user's account; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastvit_train"


def cache_path(root: Path, paths: Iterable[Path], *settings: object) -> Path | None:
    """Name the cache of images after the files' paths, sizes and times, so that any change makes a new one.

    Args:
        root: the folder of the data set.
        paths: the files.
        settings: what is cached, and what else it depends on.

    Returns:
        The path, or None if a file is not there.
    """
    digest = hashlib.sha256(repr((CACHE_FORMAT, str(root.resolve()), *settings)).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            return None
        digest.update(os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return cache_folder() / f"{digest.hexdigest()[:32]}.safetensors"


def read_cache(path: Path | None, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return the tensors that `write_cache` was given; None if there is no cache, or a damaged one."""
    try:
        if path is None or not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        log.warning("the cache %s is damaged (%s): reading the images again", path, error)
        return None


def write_cache(path: Path | None, tensors: dict[str, Tensor], root: Path) -> None:
    """Write tensors, and which folder they are from; if that fails, only say so."""
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"root": json.dumps(str(root.resolve()))})
        atomic_io.apply_umask(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        _log_once(f"nothing can be cached in {path.parent} ({error}): training continues without a cache")
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_list(name: str, lines: Sequence[str]) -> Path | None:
    """Write a text file next to the caches; returns its path, or None if it can't be written."""
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    return path

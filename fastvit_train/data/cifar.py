"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from torchvision's layout, a local archive, or the network.

Their batches are pickles, which `arrays.py` reads without running any.
"""

import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastvit_train.data.arrays import load_arrays
from fastvit_train.data.download import check_md5, download
from fastvit_train.utils.errors import UserError


@dataclass(frozen=True)
class Variant:
    """Where a CIFAR comes from and how its batches are called."""

    title: str
    archive: str
    md5: str
    folder: str
    num_classes: int
    train_batches: tuple[str, ...]
    test_batch: str
    meta: str
    label_key: str
    names_key: str


HOST = "https://www.cs.toronto.edu/~kriz/"
VARIANTS = {
    "cifar10": Variant(
        title="CIFAR-10",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        num_classes=10,
        train_batches=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_batch="test_batch",
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
    ),
    "cifar100": Variant(
        title="CIFAR-100",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        num_classes=100,
        train_batches=("train",),
        test_batch="test",
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
}

MAX_BATCH_BYTES = 1 << 28

Part = tuple[Tensor, Tensor]


def load(name: str, data_dir: Path, url: str | None) -> tuple[tuple[str, ...], Part, Part]:
    """(classes, (train images, labels), (test images, labels)); images uint8 (samples, 3, 32, 32).

    Raises:
        UserError: where the data is neither there nor to be had, or is damaged.
    """
    variant = VARIANTS[name]
    open_batch = _batches(variant, data_dir, url)
    classes = _class_names(open_batch, variant)
    train = _images(open_batch, variant.train_batches, variant.label_key)
    return classes, train, _images(open_batch, (variant.test_batch,), variant.label_key)


def _batches(variant: Variant, data_dir: Path, url: str | None) -> Callable[[str], IO[bytes]]:
    """A function that opens a batch by name, from the first place that has them; nothing is unpacked to disk."""
    for unpacked in (data_dir / variant.folder, data_dir):
        if (unpacked / variant.test_batch).is_file():
            return lambda name: _open_file(unpacked / name)
    archive = data_dir / variant.archive
    if archive.is_file():
        check_md5(archive, variant.md5)
    else:
        target = f"{variant.archive} or its unpacked folder {variant.folder}/"
        download(url or HOST + variant.archive, archive, variant.md5, put=target)
    try:
        tar = tarfile.open(archive)  # noqa: SIM115 the returned function reads from it
        members = {member.name: member for member in tar.getmembers() if member.isreg()}
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{archive} can't be unpacked ({error}); delete it and try again") from None

    def open_member(name: str) -> IO[bytes]:
        file = tar.extractfile(members[inside]) if (inside := f"{variant.folder}/{name}") in members else None
        if file is None:
            raise FileNotFoundError(name)
        return file

    return open_member


def _open_file(path: Path) -> IO[bytes]:
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    return path.open("rb")


def _read(open_batch: Callable[[str], IO[bytes]], name: str) -> dict[str, Any]:
    try:
        with open_batch(name) as file:
            return load_arrays(file, MAX_BATCH_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"CIFAR batch {name} is missing ({error}); unpack the archive anew") from None
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"CIFAR batch {name} is damaged ({error}); unpack the archive anew") from None


def _class_names(open_batch: Callable[[str], IO[bytes]], variant: Variant) -> tuple[str, ...]:
    """The names in the meta file; numbers where it is missing, or has another number of them or no texts."""
    numbers = tuple(str(label) for label in range(variant.num_classes))
    try:
        names = _read(open_batch, variant.meta).get(variant.names_key)
        texts = tuple(name.decode() if isinstance(name, bytes) else name for name in names or ())
    except (UserError, TypeError, UnicodeDecodeError):
        return numbers
    return texts if len(texts) == variant.num_classes and all(isinstance(text, str) for text in texts) else numbers


def _images(open_batch: Callable[[str], IO[bytes]], names: Sequence[str], label_key: str) -> Part:
    images, labels = [], []
    for name in names:
        batch = _read(open_batch, name)
        data, label = batch.get("data"), _whole_numbers(batch.get(label_key))
        expected = None if label is None else (len(label), 3 * 32 * 32)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != expected:
            raise UserError(
                f"CIFAR batch {name} has {_described(data)} data and {_described(batch.get(label_key))} {label_key}; "
                f"expected uint8 (samples, {3 * 32 * 32}) and an integer per sample; unpack the archive anew"
            )
        images.append(torch.from_numpy(data.copy()).view(-1, 3, 32, 32))
        labels.append(torch.from_numpy(label))
    return torch.cat(images), torch.cat(labels)


def _whole_numbers(labels: Any) -> np.ndarray | None:
    """A flat list or array of whole numbers as int64; None where it is something else."""
    if isinstance(labels, list) and all(isinstance(label, int | np.integer) for label in labels):
        labels = np.array(labels)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        return None
    return labels.astype(np.int64)


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{len(value)} of a {type(value).__name__}" if isinstance(value, list) else type(value).__name__

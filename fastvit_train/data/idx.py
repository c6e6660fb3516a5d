"""MNIST-style idx files, raw or gzipped (format: http://yann.lecun.com/exdb/mnist/)."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvit_train.data.download import download
from fastvit_train.utils.errors import UserError

HOST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
UNSIGNED_BYTE = 8
MAX_BYTES = 1 << 28


def load_pair(part: str, data_dir: Path, url: str | None) -> tuple[Tensor, Tensor]:
    """Images, uint8 (samples, height, width), and labels, int64 (samples,), of "train" or "t10k".

    Raises:
        UserError: where a file is neither there nor to be had, or is damaged.
    """
    images = read(_find(f"{part}-images-idx3-ubyte", data_dir, url), ndim=3)
    labels_path = _find(f"{part}-labels-idx1-ubyte", data_dir, url)
    labels = read(labels_path, ndim=1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path} has {len(labels)} labels for {len(images)} images; fetch both files anew")
    if images.shape[1:] != (28, 28):
        raise UserError(f"{part} images are {tuple(images.shape[1:])} pixels; Fashion-MNIST's are (28, 28)")
    return images, labels.long()


def _find(name: str, data_dir: Path, url: str | None) -> Path:
    for folder in (data_dir, data_dir / "FashionMNIST" / "raw", data_dir / "raw"):
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    target = data_dir / "FashionMNIST" / "raw" / f"{name}.gz"
    host = f"{(url or HOST).rstrip('/')}/"
    download(f"{host}{name}.gz", target, MD5[name], put=f"{name} or {name}.gz")
    return target


def read(path: Path, ndim: int) -> Tensor:
    """An idx file of unsigned bytes with `ndim` dimensions, as a uint8 tensor; UserError where it is none."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or kind != UNSIGNED_BYTE or dims != ndim:
                raise ValueError(f"it is no idx file of unsigned bytes in {ndim} dimensions")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            expected = math.prod(shape)
            if expected > MAX_BYTES:
                raise ValueError(f"its header says {expected:,} bytes; allowed are {MAX_BYTES:,}")
            data = file.read(expected + 1)  # one more would show, and its end checks a gzip file's checksum
    except (OSError, ValueError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} can't be read as an idx file ({error}); fetch it anew") from None
    if len(data) != expected:
        found = len(data) if len(data) < expected else f"more than {expected}"
        raise UserError(f"{path} holds {found} bytes of data, its header says {expected}; fetch it anew")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())

"""CIFAR-10, CIFAR-100 and Fashion-MNIST, read by torchvision's dataset classes.

CIFAR's files are pickles. torchvision opens them only if they have the published MD5, so no other pickle is loaded.
Fashion-MNIST's files hold plain bytes.
"""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

from fastvit_train.data.sources.download import check_md5, download
from fastvit_train.utils.errors import UserError

RAW_FOLDER = Path("FashionMNIST", "raw")  # where torchvision keeps the idx files
MAX_IDX_BYTES = 1 << 26  # the largest of Fashion-MNIST's files, 60,000 images of 28 x 28 pixels, has 47 MB


@dataclass(frozen=True)
class Samples:
    """Class names and, for each split, images, uint8 (samples, 3, 32, 32), and labels, int64 (samples,)."""

    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PublishedSet:
    """A published data set of 32x32 images."""

    title: str
    num_classes: int
    num_images: tuple[int, int]
    """for training and for testing"""
    find: Callable[[Path], object]
    """returns what is to be read in a data folder; None if a part is missing"""
    read: Callable[[Path, str | None, Path], Samples]
    """takes the data folder, the URL of a mirror or None, and a scratch folder to unpack to"""


def load(name: str, data_dir: Path, url: str | None) -> Samples:
    """Load a published data set from `data_dir`; download it first if it is not there.

    Args:
        name: a key of PUBLISHED.
        data_dir: the folder with the files, unpacked or as downloaded, in torchvision's subfolders or directly; may be
            read-only.
        url: a mirror: the URL of CIFAR's archive, or of the folder with Fashion-MNIST's four files.

    Raises:
        UserError: if the data set is not available, or if one of its files is damaged.
    """
    published = PUBLISHED[name]
    try:
        with TemporaryDirectory(prefix="fastvit-train-") as scratch:
            return published.read(data_dir, url, Path(scratch))
    except OSError as error:  # errors of the data set's own files are UserErrors
        raise UserError(
            f"{published.title} can't be unpacked to the temporary folder {gettempdir()} ({error.strerror or error}); "
            "make room there, or name another folder in the environment variable TMPDIR"
        ) from None


def is_available(name: str, data_dir: Path) -> bool:
    """Whether the files of a published data set are in `data_dir`, so that none is downloaded."""
    return PUBLISHED[name].find(data_dir) is not None


class CIFAR10(datasets.CIFAR10):
    """torchvision's CIFAR-10, with the batches in `root` itself."""

    unpacked_name = datasets.CIFAR10.base_folder
    base_folder = ""


class CIFAR100(datasets.CIFAR100):
    """torchvision's CIFAR-100, with the batches in `root` itself."""

    unpacked_name = datasets.CIFAR100.base_folder
    base_folder = ""


CIFARClass = type[CIFAR10] | type[CIFAR100]


def _read_cifar(cls: CIFARClass, data_dir: Path, url: str | None, scratch: Path) -> Samples:
    folder = _find_batches(cls, data_dir, url, scratch)
    try:
        train, test = cls(folder, train=True), cls(folder, train=False)
    except (RuntimeError, OSError) as error:  # torchvision's RuntimeError doesn't name the file
        for file_name, md5 in (*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])):
            check_md5(folder / file_name, md5, f"unpack {cls.filename} again")
        raise UserError(f"{folder} can't be read ({error}); unpack {cls.filename} again") from None

    def tensors(split: CIFAR10 | CIFAR100) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)

    return Samples(tuple(train.classes), tensors(train), tensors(test))


def _find_batches(cls: CIFARClass, data_dir: Path, url: str | None, scratch: Path) -> Path:
    """Return the folder of the unpacked batches: in `data_dir`, or in `scratch` if there is only the archive."""
    found, archive = _find_cifar(cls, data_dir), data_dir / cls.filename
    if found is not None and found != archive:
        return found
    if found is None:
        wanted = f"{cls.filename} or its unpacked folder {cls.unpacked_name}/"
        download(url or cls.url, archive, cls.tgz_md5, wanted)
    check_md5(archive, cls.tgz_md5, "delete it and try again")
    extract_archive(archive, scratch)
    return scratch / cls.unpacked_name


def _find_cifar(cls: CIFARClass, data_dir: Path) -> Path | None:
    """Return the folder of the unpacked batches, or the archive."""
    folders = (data_dir / cls.unpacked_name, data_dir)
    unpacked = next((folder for folder in folders if (folder / cls.test_list[0][0]).is_file()), None)
    archive = data_dir / cls.filename
    return unpacked or (archive if archive.is_file() else None)


def _read_fashion_mnist(data_dir: Path, url: str | None, scratch: Path) -> Samples:
    """Read 28x28 grey images; a border of zeros and three equal channels make them 3x32x32."""
    files = [_fetch_idx(name, md5, data_dir, url) for name, md5 in FashionMNIST.resources]
    raw_folder = scratch / RAW_FOLDER
    raw_folder.mkdir(parents=True)
    for (name, _), file in zip(FashionMNIST.resources, files, strict=True):
        (raw_folder / name.removesuffix(".gz")).write_bytes(_unpacked(file))

    def tensors(train: bool, images_file: Path, labels_file: Path) -> tuple[Tensor, Tensor]:
        try:
            split = FashionMNIST(scratch, train=train)
            images, labels = split.data, split.targets
            if images.shape != (len(labels), 28, 28):
                raise ValueError(
                    f"{len(labels)} labels, images of shape {tuple(images.shape)}; expected 28 x 28 pixels"
                )
        except Exception as error:  # torchvision raises errors of many kinds for a damaged idx file
            reason = str(error) or type(error).__name__
            raise UserError(f"{images_file} or {labels_file.name} is damaged ({reason}); fetch both again") from None
        return F.pad(images, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous(), labels

    return Samples(tuple(FashionMNIST.classes), tensors(True, *files[:2]), tensors(False, *files[2:]))


def _find_fashion_mnist(data_dir: Path) -> list[Path] | None:
    files = [file for name, _ in FashionMNIST.resources if (file := _find_idx(name, data_dir)) is not None]
    return files if len(files) == len(FashionMNIST.resources) else None


def _find_idx(name: str, data_dir: Path) -> Path | None:
    """Return an idx file, gzipped or not, from `data_dir` or from one of torchvision's folders below it."""
    folders = (data_dir, data_dir / RAW_FOLDER, data_dir / "raw")
    files = [folder / version for folder in folders for version in (name.removesuffix(".gz"), name)]
    return next((file for file in files if file.is_file()), None)


def _fetch_idx(name: str, md5: str, data_dir: Path, url: str | None) -> Path:
    """Return an idx file, which is downloaded if it is not there."""
    if (found := _find_idx(name, data_dir)) is not None:
        return found
    mirror, target = (url or FashionMNIST.mirrors[0]).rstrip("/"), data_dir / RAW_FOLDER / name
    download(f"{mirror}/{name}", target, md5, f"{name.removesuffix('.gz')} or {name}")
    return target


def _unpacked(file: Path) -> bytes:
    """Return an idx file's content. Only a download has an MD5 to check: Linux distributions gzip the files anew."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read(MAX_IDX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} can't be read ({error}); fetch it again") from None
    if len(content) > MAX_IDX_BYTES:
        raise UserError(f"{file} holds more than {MAX_IDX_BYTES:,} bytes; fetch it again")
    return content


PUBLISHED = {
    "cifar10": PublishedSet(
        "CIFAR-10", 10, (50_000, 10_000), partial(_find_cifar, CIFAR10), partial(_read_cifar, CIFAR10)
    ),
    "cifar100": PublishedSet(
        "CIFAR-100", 100, (50_000, 10_000), partial(_find_cifar, CIFAR100), partial(_read_cifar, CIFAR100)
    ),
    "fashion-mnist": PublishedSet("Fashion-MNIST", 10, (60_000, 10_000), _find_fashion_mnist, _read_fashion_mnist),
}

"""Folders of images, with train/ and test/ (or val/) and a folder per class in each; decoded once, then cached."""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvit_train.data.images import StreamedImages
from fastvit_train.distributed.env import local_world_size
from fastvit_train.utils.errors import UserError

log = logging.getLogger(__name__)
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
TEST_NAMES = ("test", "val")
DECODE_BATCH = 256
CACHE_FORMAT = 1

LabelledImages = tuple[Tensor | Sequence[Path], Tensor]


@dataclass(frozen=True)
class Listing:
    """The image files of both splits, sorted by class and path, and their labels, int64 (samples,)."""

    root: Path
    classes: tuple[str, ...]
    test_name: str
    train: tuple[list[Path], Tensor]
    test: tuple[list[Path], Tensor]


def list_images(root: Path) -> Listing:
    """Find the images below `root`.

    Raises:
        UserError: if a folder is missing or empty, or if train and test have different classes.
    """
    classes, test_name = find_classes(root)
    return Listing(
        root, classes, test_name, _class_files(root / "train", classes), _class_files(root / test_name, classes)
    )


def find_classes(root: Path) -> tuple[tuple[str, ...], str]:
    """Return the names of the classes below `root`, sorted, and the name of the test split's folder.

    Raises:
        UserError: if a folder is missing or empty, or if train and test have different classes.
    """
    expected = f"expected {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE (or val/)"
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; {expected}")
    test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), None)
    missing = [name for name, exists in (("train", (root / "train").is_dir()), ("test", test_name)) if not exists]
    if missing or test_name is None:
        reason = "is empty" if not any(root.iterdir()) else f"has no {'/ and no '.join(missing)}/"
        raise UserError(f"--data-dir {root} {reason}; {expected}")
    classes, test_classes = _class_names(root / "train"), _class_names(root / test_name)
    if classes != test_classes:
        only_train = sorted(set(classes) - set(test_classes)) or "nothing"
        only_test = sorted(set(test_classes) - set(classes)) or "nothing"
        raise UserError(
            f"train/ and {test_name}/ in {root} have different classes: only in train/ {only_train}, "
            f"only in {test_name}/ {only_test}; both must have the same folders"
        )
    return classes, test_name


def _class_names(split: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise UserError(f"{split} has no class folders; expected {split}/CLASS/IMAGE")
    return names


def _class_files(split: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            Path(parent) / file
            for parent, _, names in os.walk(split / name)
            for file in names
            if Path(file).suffix.lower() in EXTENSIONS and not file.startswith(".")
        )
        if not files:
            raise UserError(
                f"class folder {split / name} holds no images; allowed extensions: {' '.join(sorted(EXTENSIONS))}"
            )
        paths += files
        labels += [label] * len(files)
    return paths, torch.tensor(labels)


def load(listing: Listing, image_size: int, stream: str) -> tuple[LabelledImages, LabelledImages]:
    """Load both splits: images, uint8 (samples, 3, image_size, image_size), or the files' paths if they are streamed.

    Args:
        stream: "always", "never", or "auto": stream if the images would take more than half of the free memory.

    Raises:
        UserError: if a file can't be decoded (the message names the first), or if the images don't fit in memory.
    """
    num_images = len(listing.train[0]) + len(listing.test[0])
    needed = num_images * 3 * image_size**2
    too_large = stream == "auto" and needed > free_memory() / 2
    if too_large:
        size = f"{image_size} x {image_size}"
        log.warning("%d images of %s pixels take %.1f GB: streaming from disk", num_images, size, needed / 1e9)
    if too_large or stream == "always":
        return listing.train, listing.test
    if needed > (free := free_memory()):
        raise UserError(
            f"{num_images} images take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; give --stream always"
        )
    cache = _cache_path(listing, image_size)
    tensors = _read_cache(cache)
    if tensors is None:
        tensors = {
            "train": _decode(listing.train[0], image_size, f"decoding {listing.root.name}/train"),
            "test": _decode(listing.test[0], image_size, f"decoding {listing.root.name}/{listing.test_name}"),
        }
        _write_cache(cache, tensors, listing)
    return (tensors["train"], listing.train[1]), (tensors["test"], listing.test[1])


def free_memory() -> int:
    """Return the free bytes for this process: its share of the host's memory, or its GPU's memory if that is less."""
    host = psutil.virtual_memory().available // local_world_size()
    return min(host, torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else host


def _decode(paths: Sequence[Path], image_size: int, title: str) -> Tensor:
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    samples = torch.arange(len(paths)).split(DECODE_BATCH)
    batches = StreamedImages(paths, image_size, torch.device("cpu")).batches(samples)
    progress = track(batches, title, total=len(samples), disable=not sys.stderr.isatty())
    for samples_B, batch in zip(samples, progress, strict=True):
        images[samples_B] = batch
    return images


def _cache_path(listing: Listing, image_size: int) -> Path:
    """Name the cache after the files' paths, sizes and modification times, so that any change makes a new one."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, image_size, str(listing.root.resolve()))).encode())
    for path in (*listing.train[0], *listing.test[0]):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}); replace or remove the file") from None
        digest.update(os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base / "fastvit_train" / f"{digest.hexdigest()[:32]}.safetensors"


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in ("train", "test")}
    except (SafetensorError, OSError) as error:
        log.warning("the cache %s is damaged (%s): decoding the images again", path, error)
        return None


def _write_cache(path: Path, tensors: dict[str, Tensor], listing: Listing) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"root": json.dumps(str(listing.root.resolve()))})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning(
            "the decoded images can't be cached in %s (%s): training continues without a cache", path.parent, error
        )
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

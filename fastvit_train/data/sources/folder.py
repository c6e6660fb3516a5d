"""Folders of images: a folder per class, in train/ and test/ (or val/) or in neither; decoded once, then cached."""

import hashlib
import logging
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from fastvit_train.config.resolved import InputSize
from fastvit_train.data.decode import ImageFiles, Unreadable, describe_transparency, examine
from fastvit_train.data.encoded import Source
from fastvit_train.data.images import StreamedImages, cache_path, read_cache, write_cache, write_list
from fastvit_train.data.rendering import Rendering
from fastvit_train.data.sources.image_paths import PassedOver, describe, find_folders, find_images, no_images_error
from fastvit_train.distributed.env import local_world_size
from fastvit_train.utils import machine
from fastvit_train.utils.errors import UserError, counted, printable

log = logging.getLogger(__name__)
TRAIN_NAME, TEST_NAMES = "train", ("test", "val")
LONG_TEST_NAMES = (*TEST_NAMES, "validation", "valid")
"""names of test splits in data sets that are not folders of images, preferred first"""
SPLITS, TRANSPARENT = ("train", "test"), "transparent"
"""names of tensors in caches"""
DECODE_BATCH = 256
EXAMINE_BATCH = 1024
MAX_DAMAGED_SHOWN = 10

ClassFolders = dict[str, list[Path]]
"""the folders of each class, by its name"""


@dataclass(frozen=True)
class Layout:
    """The class folders of a data set; `test` is empty if a part of the training set is held out for testing."""

    train: ClassFolders
    test: ClassFolders
    test_name: str
    passed_over: PassedOver


@dataclass(frozen=True)
class Listing:
    """The encoded images of both splits, and their labels, int64 (samples,); files are sorted by class and path."""

    root: Path
    """where they are from"""
    title: str
    """what is printed with every accuracy"""
    classes: tuple[str, ...]
    test_name: str
    train: tuple[Sequence[Source], Tensor]
    test: tuple[Sequence[Source], Tensor]
    passed_over: PassedOver
    files: Sequence[Path]
    """what the caches depend on"""

    @property
    def paths(self) -> list[Source]:
        """The images of both splits."""
        return [*self.train[0], *self.test[0]]


@dataclass(frozen=True)
class Loaded:
    """The images of both splits: uint8 (samples, channels, height, width), or files to stream; lines to print."""

    train: Tensor | ImageFiles
    test: Tensor | ImageFiles
    notes: tuple[str, ...]


def list_images(root: Path, holdout: bool = False) -> Listing:
    """Find the images below `root`.

    Args:
        root: the folder of the data set.
        holdout: part of the training set is held out, so that no test split is needed or read.

    Raises:
        UserError: if a folder is missing or empty, or if train and test have different classes.
    """
    layout = find_layout(root, holdout)
    train, in_train = _list_split(layout.train)
    test, in_test = _list_split(layout.test)
    passed_over = layout.passed_over + in_train + in_test
    files = train[0] + test[0]
    title = printable(root.resolve().name)
    return Listing(root, title, tuple(layout.train), layout.test_name, train, test, passed_over, files)


def find_layout(root: Path, holdout: bool) -> Layout:
    """Find the class folders below `root`; arguments and errors are those of `list_images`."""
    expected = f"expected {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE (or val/)"
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; {expected}")
    test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), None)
    if holdout:
        train, passed_over = _find_classes(root if _holds_classes(root) else root / TRAIN_NAME)
        return Layout(train, {}, "holdout", passed_over)
    missing = [name for name, there in ((TRAIN_NAME, (root / TRAIN_NAME).is_dir()), ("test", test_name)) if not there]
    if missing or test_name is None:
        reason = "is empty" if not any(root.iterdir()) else f"has no {'/ and no '.join(missing)}/"
        raise UserError(
            f"--data-dir {root} {reason}; {expected}, or {root}/CLASS/IMAGE and a training with --holdout 0.2, which "
            "evaluates on a fifth of each class"
        )
    (train, in_train), (test, in_test) = _find_classes(root / TRAIN_NAME), _find_classes(root / test_name)
    if list(train) != list(test):
        only_train = [name for name in train if name not in test] or "nothing"
        only_test = [name for name in test if name not in train] or "nothing"
        raise UserError(
            f"train/ and {test_name}/ in {root} have different classes: only in train/ {only_train}, "
            f"only in {test_name}/ {only_test}; both must have the same folders"
        )
    return Layout(train, test, test_name, in_train + in_test)


def _holds_classes(root: Path) -> bool:
    """Return whether the folders in `root` are those of the classes; one of them may be named train."""
    folders, _ = find_folders(root)
    splits = [path for path in folders if path.name in (TRAIN_NAME, *TEST_NAMES)]
    return len(splits) < len(folders) and not any(find_folders(path)[0] for path in splits)


def _find_classes(split: Path) -> tuple[ClassFolders, PassedOver]:
    """Return the class folders in a split, sorted by name, and what is passed over."""
    if not split.is_dir():
        raise UserError(f"{split.parent} has no {split.name}/ and no class folders; expected {split}/CLASS/IMAGE")
    folders, passed_over = find_folders(split)
    if not folders:
        raise UserError(f"{split} has no class folders; expected {split}/CLASS/IMAGE")
    classes: ClassFolders = defaultdict(list)
    for path in folders:
        classes[_class_name(path)].append(path)
    return dict(sorted(classes.items())), passed_over


def _class_name(folder: Path) -> str:
    """Return the name of a folder's class, which is the same on every machine and can be printed.

    It is read as UTF-8 whatever the locale. Names that look the same are the same class: macOS writes an accent as a
    character of its own, others do not.
    """
    try:
        name = os.fsencode(folder.name).decode("utf-8")
    except UnicodeError:  # the name is in the encoding of the locale, or in none
        name = folder.name
    return printable(unicodedata.normalize("NFC", name))


def _list_split(classes: ClassFolders) -> tuple[tuple[list[Path], Tensor], PassedOver]:
    """Return the images of a split with their labels, and what is passed over."""
    paths: list[Path] = []
    labels: list[int] = []
    passed_over: PassedOver = Counter()
    for label, folders in enumerate(classes.values()):
        files: list[Path] = []
        others: PassedOver = Counter()
        for folder in folders:
            found, beside = find_images(folder)
            files, others = files + found, others + beside
        if not files:
            raise no_images_error(f"class folder {folders[0]} holds", others)
        paths += files
        labels += [label] * len(files)
        passed_over += others
    return (paths, torch.tensor(labels, dtype=torch.int64)), passed_over


def load(listing: Listing, input_size: InputSize, stream: str, rendering: Rendering, examine_streamed: bool) -> Loaded:
    """Load the images of both splits.

    Args:
        listing: the files.
        input_size: channels, height and width of decoded images.
        stream: "always", "never", or "auto": stream if the images would take more than half of the free memory.
        rendering: how files become images.
        examine_streamed: look at the header of each image that is streamed, before it is decoded.

    Raises:
        UserError: if files can't be decoded (the message lists them), or if the images don't fit in memory.
    """
    train, test = ImageFiles(listing.train[0], rendering), ImageFiles(listing.test[0], rendering)
    if _streams(len(train) + len(test), input_size, stream):
        transparent = _examine(listing) if examine_streamed else 0
        return Loaded(train, test, _notes(listing, transparent, rendering.background))
    cache = cache_path(listing.root, listing.files, "decoded", len(train), input_size, rendering)
    transparent = _examine(listing)
    tensors = read_cache(cache, SPLITS)
    if tensors is None:
        tensors = _decode(listing, train, test, input_size)
        write_cache(cache, tensors, listing.root)
    return Loaded(tensors["train"], tensors["test"], _notes(listing, transparent, rendering.background))


def _streams(num_images: int, input_size: InputSize, stream: str) -> bool:
    """Return whether to decode `num_images` images again in each epoch; `stream` is as in `load`."""
    needed = num_images * input_size.nbytes
    too_large = stream == "auto" and needed > free_memory() / 2
    if too_large:
        log.warning("%d images of %s pixels take %.1f GB: streaming from disk", num_images, input_size, needed / 1e9)
    if too_large or stream == "always":
        return True
    if needed > (free := free_memory()):
        raise UserError(
            f"{num_images} images take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; give --stream always"
        )
    return False


def free_memory() -> int:
    """Return the free bytes for this process: its share of what the machine or container has, or its GPU's if less."""
    host = machine.available_memory() // local_world_size()
    return min(host, torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else host


def _notes(listing: Listing, transparent: int, background: str) -> tuple[str, ...]:
    """Return the lines to print about the images, in the order in which they were found."""
    composed = describe_transparency(transparent, background)
    lines = (describe(listing.passed_over), composed and f"{composed} (--background)")
    return tuple(line for line in lines if line)


def _examine(listing: Listing) -> int:
    """Return the number of images that may have transparent parts; UserError if there are damaged files.

    The files are not examined again until one of them changes.
    """
    paths = listing.paths
    cache = cache_path(listing.root, listing.files, "examined")
    if (examined := read_cache(cache, (TRANSPARENT,))) is not None:
        return int(examined[TRANSPARENT])
    damaged: list[Unreadable] = []
    transparent = 0
    starts = range(0, len(paths), EXAMINE_BATCH)
    for start in track(starts, f"reading headers in {listing.title}", disable=not sys.stderr.isatty()):
        unreadable, count = examine(paths[start : start + EXAMINE_BATCH])
        damaged += unreadable
        transparent += count
    if damaged:
        raise _damaged_error(listing, damaged)
    write_cache(cache, {TRANSPARENT: torch.tensor(transparent)}, listing.root)
    return transparent


def _decode(listing: Listing, train: ImageFiles, test: ImageFiles, input_size: InputSize) -> dict[str, Tensor]:
    """Decode both splits; UserError if there are damaged files."""
    damaged: list[Unreadable] = []
    tensors = {}
    for name, files in zip(SPLITS, (train, test), strict=True):
        images = torch.empty(len(files), *input_size, dtype=torch.uint8)
        samples = torch.arange(len(files)).split(DECODE_BATCH) if len(files) else ()
        batches = StreamedImages(files, input_size, torch.device("cpu")).try_batches(samples)
        title = f"decoding {listing.title}, {name}"
        progress = track(batches, title, total=len(samples), disable=not sys.stderr.isatty())
        for samples_B, batch in zip(samples, progress, strict=True):
            if isinstance(batch, list):
                damaged += batch
            else:
                images[samples_B] = batch
        tensors[name] = images
    if damaged:
        raise _damaged_error(listing, damaged)
    return tensors


def _damaged_error(listing: Listing, damaged: Sequence[Unreadable]) -> UserError:
    """Return an error that lists the files; a long list is written to a file."""
    if len(damaged) == 1:
        return UserError(str(damaged[0]))
    shown = "; ".join(f"{file.path} ({file.reason})" for file in damaged[:MAX_DAMAGED_SHOWN])
    rest = ""
    if len(damaged) > MAX_DAMAGED_SHOWN:
        digest = hashlib.blake2b(str(listing.root.resolve()).encode(errors="surrogateescape"), digest_size=4)
        whole = write_list(f"damaged-{digest.hexdigest()}.txt", [str(file.path) for file in damaged])
        rest = f"; all of them are listed in {whole}" if whole else "; ..."
    count = f"{len(damaged):,} of {counted(len(listing.paths), 'image')}"
    return UserError(f"{count} can't be decoded; replace or remove them: {shown}{rest}")

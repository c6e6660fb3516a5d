"""Shards: tar files in WebDataset's format, whose images are read where they lie, without being unpacked.

A sample is a group of files with the same name but for the extension: an image, and its class in a file `.cls` or
as an entry of a file `.json`. Source: https://github.com/webdataset/webdataset
"""

import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import SEEK_END
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor

from fastvit_train.data.encoded import Member
from fastvit_train.data.images import cache_path, read_cache, write_cache
from fastvit_train.data.sources.folder import LONG_TEST_NAMES, TRAIN_NAME, Listing
from fastvit_train.data.sources.image_paths import is_hidden, is_image, walk
from fastvit_train.distributed.env import is_rank0
from fastvit_train.utils.errors import UserError, counted, printable

LABEL_KEYS = ("cls", "label", "class", "target")
"""the entries of a .json file that may hold the class, preferred first"""
CLASS_NAMES = "classnames.txt"
"""the file in the folder that names the classes 0, 1 and so on, one in each line, as CLIP's benchmarks have it"""
UNLABELED = "-1"
"""the label of images whose class is kept secret"""
NUMBER = "[0-9]{1,9}"
SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""the name of a file: the sample's, up to the first dot, and the extension"""
MAX_LABEL_BYTES = MAX_END_BYTES = 1 << 20
CACHED = ("samples", "texts")
"""names of tensors in caches"""


@dataclass(frozen=True)
class Shards:
    """The tar files of a data set; `test` is empty if a part of the training set is held out for testing."""

    train: list[Path]
    test: list[Path]
    test_name: str
    unused: int = 0
    """number of .tar files in neither split"""


@dataclass(frozen=True)
class Sample:
    """Where an image is in its shard, and what its label says; size 0 for no image, an empty label for no label."""

    start: int
    size: int
    label: str


@dataclass(frozen=True)
class Index:
    """The samples of some shards that have an image and a class, and how many lack one of the two."""

    samples: Tensor
    """int64 (samples, 4): the number of the shard, the image's start and size in it, and the number of the text"""
    texts: list[str]
    """what the labels say, by number"""
    passed_over: int

    @property
    def labels(self) -> set[str]:
        """What the labels of the samples say."""
        return {self.texts[number] for number in self.samples[:, 3].unique().tolist()}


def list_members(root: Path, holdout: bool = False) -> tuple[Listing, tuple[str, ...]]:
    """Find the images in the tar files below `root`.

    Args:
        root: the folder of the shards. A shard belongs to the split that its path names, as `train` in
            `train/0001.tar` or `photos-train-0001.tar`.
        holdout: part of the training set is held out, so that no test split is needed or read.

    Returns:
        The images, and lines about files and samples that are passed over.

    Raises:
        UserError: if there are no shards, if one of them is damaged, or if no sample has an image and a class.
    """
    shards = _find_shards(root, holdout)
    train, test = _index(root, shards.train), _index(root, shards.test)
    classes, numbers = _classes(root, train.labels)
    if unknown := sorted(test.labels - set(numbers)):
        raise UserError(f"{root}: no training image has the class {unknown[0]!r}, but a test image has it")

    def split(index: Index, paths: list[Path]) -> tuple[list[Member], Tensor]:
        members = [Member(paths[shard], start, size) for shard, start, size in index.samples[:, :3].tolist()]
        by_text = torch.tensor([numbers.get(text, -1) for text in index.texts], dtype=torch.int64)
        return members, by_text[index.samples[:, 3]]

    notes = []
    if shards.unused:
        unused = counted(shards.unused, ".tar file")
        notes.append(f"{unused} passed over: not of the splits train and {shards.test_name}")
    if passed_over := train.passed_over + test.passed_over:
        notes.append(f"{counted(passed_over, 'sample')} without an image or without a class passed over")
    splits = split(train, shards.train), split(test, shards.test)
    files = [*shards.train, *shards.test]
    listing = Listing(root, printable(root.resolve().name), classes, shards.test_name, *splits, Counter(), files)
    return listing, tuple(notes)


def count_classes(root: Path, holdout: bool) -> int:
    """Return the number of classes; arguments and errors are those of `list_members`."""
    return len(_classes(root, _index(root, _find_shards(root, holdout).train).labels)[0])


def _find_shards(root: Path, holdout: bool) -> Shards:
    expected = f"expected {root}/train-0000.tar and {root}/test-0000.tar"
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; {expected}")
    found = _tar_files(root)
    if not found:
        packed = next(root.rglob("*.tar.*"), next(root.rglob("*.tgz"), None))
        hint = f", and {packed.name} is compressed: decompress it" if packed else ""
        raise UserError(f"--data-dir {root} has no .tar files{hint}; {expected}")
    words = {path: re.findall("[a-z]+", path.relative_to(root).as_posix().lower()) for path in found}
    tests = {name: [path for path in found if name in words[path]] for name in LONG_TEST_NAMES}
    others = [path for path in found if not any(path in paths for paths in tests.values())]
    train = [path for path in others if TRAIN_NAME in words[path]]
    if holdout and not others:
        raise UserError(f"--data-dir {root} has only .tar files of a test set; expected {root}/train-0000.tar")
    if holdout:
        return Shards(train or others, [], "holdout")
    test_name = next((name for name in LONG_TEST_NAMES if tests[name]), None)
    if not train or test_name is None:
        missing = "train" if not train else f"{', '.join(LONG_TEST_NAMES[:-1])} or {LONG_TEST_NAMES[-1]}"
        raise UserError(
            f"--data-dir {root} has no .tar files with {missing} in their names; {expected}, or a training with "
            "--holdout 0.1, which evaluates on some training images"
        )
    return Shards(train, tests[test_name], test_name, len(found) - len(train) - len(tests[test_name]))


def _tar_files(root: Path) -> list[Path]:
    """Return the .tar files in `root` and in all folders below it, linked ones too."""
    return sorted(parent / name for parent, files, _ in walk(root) for name in files if _is_tar(name))


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not is_hidden(name)


def _index(root: Path, shards: Sequence[Path]) -> Index:
    """Find the images in `shards`. The headers are read again only if a shard changes."""
    if not shards:
        return Index(torch.empty(0, 4, dtype=torch.int64), [], 0)
    cache = cache_path(root, shards, "samples")
    with _one_at_a_time(cache):
        tensors = read_cache(cache, CACHED)
        if tensors is None:
            tensors = _scan_all(root, shards)
            write_cache(cache, tensors, root)
    samples, texts = tensors["samples"], json.loads(bytes(tensors["texts"].tolist()))
    is_labeled = torch.tensor([bool(text) for text in texts], dtype=torch.bool)[samples[:, 3]]
    whole = samples[is_labeled & (samples[:, 2] > 0)]
    if not len(whole):
        keys = ", ".join(LABEL_KEYS)
        raise UserError(
            f"{shards[0]} has no sample with an image and a class; expected files such as 0001.jpg and 0001.cls, or "
            f"0001.json with one of the entries {keys}"
        )
    return Index(whole, texts, len(samples) - len(whole))


@contextmanager
def _one_at_a_time(cache: Path | None) -> Iterator[None]:
    """Let one process of this machine after another read the headers: all but the first find them in the cache."""
    with ExitStack() as stack:
        if cache is not None:
            with suppress(OSError):  # if the lock can't be written, nor can the cache
                cache.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(cache.with_suffix(".lock")))
        yield


def _scan_all(root: Path, shards: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors that a cache holds: of all samples, and the labels' texts as JSON."""
    progress = track(shards, f"reading headers in {root.name}", disable=not is_rank0() or not sys.stderr.isatty())
    samples = [(number, sample) for number, shard in enumerate(progress) for sample in _scan(shard)]
    texts = sorted({sample.label for _, sample in samples})
    label_of = {text: label for label, text in enumerate(texts)}
    rows = [(number, sample.start, sample.size, label_of[sample.label]) for number, sample in samples]
    encoded = torch.tensor(list(json.dumps(texts).encode()), dtype=torch.uint8)
    return {"samples": torch.tensor(rows, dtype=torch.int64).view(-1, 4), "texts": encoded}


def _scan(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a shard, from the headers of its files."""
    try:
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for files in _group(tar):
                yield _sample(stream, files)
            _check_end(stream, tar)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} can't be read as a tar file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{shard} can't be read ({error.strerror or error})") from None


def _group(tar: tarfile.TarFile) -> list[dict[str, tarfile.TarInfo]]:
    """Return the files of each sample by their extension; a name with the same extension again begins a new sample."""
    samples: list[dict[str, tarfile.TarInfo]] = []
    newest: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isreg() and (match := SAMPLE.fullmatch(member.name)):
            name, extension = match[1], match[2].lower()
            if name not in newest or extension in newest[name]:
                newest[name] = {}
                samples.append(newest[name])
            newest[name][extension] = member
    return samples


def _sample(stream: IO[bytes], files: dict[str, tarfile.TarInfo]) -> Sample:
    """Return the sample of files that differ in their extensions; of several images, the one with the shortest."""
    images = [extension for extension in files if is_image(f"image.{extension}")]
    image = files[min(images, key=len)] if images else None
    label = ""
    if "cls" in files:
        label = _content(stream, files["cls"]).strip()
    elif "json" in files:
        with suppress(ValueError, RecursionError):  # a file that is not JSON says nothing about the class
            label = _entry(json.loads(_content(stream, files["json"])))
    start, size = (image.offset_data, image.size) if image else (0, 0)
    label = str(int(label)) if re.fullmatch(NUMBER, label) else label
    return Sample(start, size, "" if label == UNLABELED else label)


def _content(stream: IO[bytes], member: tarfile.TarInfo) -> str:
    stream.seek(member.offset_data)
    return stream.read(min(member.size, MAX_LABEL_BYTES)).decode(errors="replace")


def _entry(described: object) -> str:
    """Return the class in the content of a .json file; empty if there is none."""
    entries = described if isinstance(described, dict) else {}
    values = (entries.get(key) for key in LABEL_KEYS)
    return next((str(value).strip() for value in values if type(value) in (int, str)), "")


def _check_end(stream: IO[bytes], tar: tarfile.TarFile) -> None:
    """Raise ValueError unless the tar file ends where its last file does: tarfile stops at a damaged header."""
    members, end = tar.getmembers(), 0
    if members:
        last = members[-1]
        end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if stream.seek(0, SEEK_END) < last.offset_data + last.size:
            raise ValueError("it is incomplete")
    stream.seek(end)
    if stream.read(MAX_END_BYTES).strip(b"\0"):
        raise ValueError(f"a damaged header at byte {end:,}")


def _classes(root: Path, labels: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the classes, and the number of each label: numbers in order, or else texts in order."""
    texts = sorted(labels)
    names = _class_names(root)
    if not all(re.fullmatch(NUMBER, text) for text in texts):
        return tuple(map(printable, texts)), {text: number for number, text in enumerate(texts)}
    texts.sort(key=int)
    if names is None:
        return tuple(texts), {text: number for number, text in enumerate(texts)}
    if int(texts[-1]) >= len(names):
        listed = counted(len(names), "class")
        raise UserError(f"{root / CLASS_NAMES} names {listed}, counted from 0, but an image has class {texts[-1]}")
    return names, {str(number): number for number in range(len(names))}


def _class_names(root: Path) -> tuple[str, ...] | None:
    path = root / CLASS_NAMES
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})") from None
    names = tuple(printable(line.strip()) for line in lines)
    if not all(names):
        raise UserError(f"{path} has no name in line {names.index('') + 1}; give each class a line")
    return names

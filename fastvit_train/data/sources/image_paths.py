"""Which files and folders count as images and classes, and the images that a command's arguments stand for."""

import glob
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from fastvit_train.data.decode import MAX_FILE_BYTES
from fastvit_train.utils.errors import UserError, printable

log = logging.getLogger(__name__)
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)
"""extensions of the formats that are decoded; in a file's name their case does not matter"""
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""folders that operating systems and storage devices add to a user's folders"""
MAX_KINDS_SHOWN = 10
STANDARD_INPUT = "-"
SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")

PassedOver = Counter[str]
"""How many files and folders do not count: files by their extension, and the two kinds below."""
HIDDEN, OUTSIDE = "hidden", "outside of the class folders"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name never counts, because it is hidden or the system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_image(name: str) -> bool:
    """Return whether a file of this name counts as an image."""
    return Path(name).suffix.lower() in EXTENSIONS and not is_hidden(name)


def find_folders(folder: Path) -> tuple[list[Path], PassedOver]:
    """Return the folders in `folder`, linked ones too, sorted by name, and what is passed over.

    Raises:
        UserError: if `folder` can't be read.
    """
    _, folders, files = next(os.walk(folder, onerror=_refuse))
    passed_over = Counter({HIDDEN: sum(map(is_hidden, folders)), OUTSIDE: sum(map(is_image, files))})
    return [folder / name for name in sorted(folders) if not is_hidden(name)], passed_over


def find_images(folder: Path) -> tuple[list[Path], PassedOver]:
    """Return the images in `folder` and in all folders below it, sorted by path, and what is passed over.

    Raises:
        UserError: if a folder can't be read.
    """
    images: list[Path] = []
    passed_over: PassedOver = Counter()
    for parent, files, hidden_folders in walk(folder):
        passed_over[HIDDEN] += hidden_folders
        images += [parent / name for name in files if is_image(name)]
        passed_over += count_others(files)
    return sorted(images), passed_over


def walk(folder: Path) -> Iterator[tuple[Path, list[str], int]]:
    """Yield `folder` and all folders below it, each with the names of its files and the number of its hidden folders.

    Linked folders are followed after all others. Each folder is read once, and none that contains `folder`.

    Raises:
        UserError: if a folder can't be read.
    """
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    to_walk = [folder]
    for start in to_walk:  # links are appended on the way
        for parent, folders, files in os.walk(start, onerror=_refuse):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            hidden = sum(map(is_hidden, folders))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            to_walk += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            yield Path(parent), files, hidden


def count_others(files: Iterable[str]) -> PassedOver:
    """Count the files that are not images, by name."""
    others = (name for name in files if not is_image(name))
    return Counter(HIDDEN if is_hidden(name) else Path(name).suffix.lower() or "no extension" for name in others)


def describe(passed_over: PassedOver) -> str:
    """Return a line such as "12 files are not images we read: .heic 9, .txt 3"; empty if nothing was passed over."""
    kinds = [(count, kind) for kind, count in passed_over.items() if kind not in (HIDDEN, OUTSIDE)]
    parts = []
    if total := sum(count for count, _ in kinds):
        by_count = sorted(kinds, key=lambda item: (-item[0], item[1]))
        shown = ", ".join(f"{printable(kind)} {count:,}" for count, kind in by_count[:MAX_KINDS_SHOWN])
        more = ", ..." if len(kinds) > MAX_KINDS_SHOWN else ""
        what = "1 file is not an image" if total == 1 else f"{total:,} files are not images"
        parts.append(f"{what} we read: {shown}{more}")
    if count := passed_over[OUTSIDE]:
        parts.append(f"{'1 image is' if count == 1 else f'{count:,} images are'} not in a class folder")
    if count := passed_over[HIDDEN]:
        parts.append(f"passed over: {count:,} hidden {'file or folder' if count == 1 else 'files and folders'}")
    return "; ".join(parts)


def no_images_error(what: str, passed_over: PassedOver) -> UserError:
    """Return the error to raise if `what`, such as "folder photos holds", leads to no image."""
    found = describe(passed_over)
    allowed = " ".join(sorted(EXTENSIONS))
    return UserError(f"{what} no images{f' ({found})' if found else ''}; allowed extensions: {allowed}")


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} can't be read ({error.strerror}); change its permissions or remove it")


@contextmanager
def expand_paths(images: Sequence[str], verb: str) -> Iterator[list[tuple[str, Path]]]:
    """Yield (name to show, path) of every image file that `images` stands for, without checking the files.

    A warning says what was passed over in folders and among the matches of patterns.

    Args:
        images: files, folders (all images below them), patterns, or "-" for standard input, which holds an image or
            one name per line.
        verb: the command, for the example in the error message.

    Raises:
        UserError: if there are no images.
    """
    if not images:
        raise UserError(f"{verb} takes images after the run, as in: {verb} runs/NAME cat.png photos/ '*.jpg'")
    with tempfile.TemporaryDirectory() as folder:
        files: list[tuple[str, Path]] = []
        passed_over: PassedOver = Counter()
        for name in images:
            if name == STANDARD_INPUT:
                files += _from_standard_input(Path(folder), passed_over)
            else:
                files += _expand(name, passed_over)
        if line := describe(passed_over):
            log.warning("%s", line)
        yield files


def _expand(name: str, passed_over: PassedOver) -> list[tuple[str, Path]]:
    """Return the images that a name stands for; a file that is named itself counts as one, whatever its extension."""
    path = Path(name)
    if path.is_dir():
        what, (paths, others) = f"folder {name} holds", find_images(path)
    elif path.exists() or not glob.has_magic(name):
        return [(str(path), path)]
    else:
        what, (paths, others) = f"pattern {name} matches", _find_matches(name)
    if not paths:
        raise no_images_error(what, others)
    passed_over.update(others)
    return [(str(path), path) for path in paths]


def _find_matches(pattern: str) -> tuple[list[Path], PassedOver]:
    """Return the images that a pattern matches, those in the folders that it matches, and what is passed over."""
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise UserError(f"no file matches {pattern!r}; check its spelling (** matches any folders)")
    files = [path for path in matches if not path.is_dir()]
    images, passed_over = [path for path in files if is_image(path.name)], count_others(path.name for path in files)
    if "**" not in pattern:  # which matches the files in these folders too
        for folder in (path for path in matches if path.is_dir() and not is_hidden(path.name)):
            inside, others = find_images(folder)
            images, passed_over = images + inside, passed_over + others
    return images, passed_over


def _from_standard_input(folder: Path, passed_over: PassedOver) -> list[tuple[str, Path]]:
    """Read an image, or the names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if content.startswith(SIGNATURES) and not _is_text(content):
        path = folder / "image"
        path.write_bytes(content)
        return [(STANDARD_INPUT, path)]
    names = [line for line in os.fsdecode(content).splitlines() if line.strip()]
    if not names or any("\0" in name for name in names):
        raise UserError("standard input holds neither an image nor names of images; write one name per line")
    return [file for name in names for file in _expand(name, passed_over)]


def _is_text(content: bytes) -> bool:
    """Return True for text: names of files may begin with a format's signature too, such as BM or P5."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False

"""Images that are named one by one, by folder, by pattern, or on standard input."""

import glob
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvit_train.data.folder import EXTENSIONS
from fastvit_train.data.images import MAX_FILE_BYTES
from fastvit_train.utils.errors import UserError

STANDARD_INPUT = "-"
SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6")


@contextmanager
def expand_paths(images: Sequence[str], verb: str) -> Iterator[list[tuple[str, Path]]]:
    """The image files that `images` stand for, good or not, each with the name that it is called by.

    Args:
        images: files, folders (all images below), patterns, or "-" for standard input: an image, or names of images,
            one per line.
        verb: what they are for, for the error's example.

    Raises:
        UserError: where there are none.
    """
    if not images:
        raise UserError(f"{verb} takes images after the run, as in: {verb} runs/NAME cat.png photos/ '*.jpg'")
    with tempfile.TemporaryDirectory() as folder:
        files: list[tuple[str, Path]] = []
        for name in images:
            if name == STANDARD_INPUT:
                files += _from_standard_input(Path(folder))
            else:
                files += [(str(path), path) for path in _expand(name)]
        yield files


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        expand_paths = sorted(
            Path(where) / file
            for where, _, names in os.walk(path)
            for file in names
            if Path(file).suffix.lower() in EXTENSIONS
        )
        if not expand_paths:
            raise UserError(f"folder {name} holds no images; allowed: {' '.join(sorted(EXTENSIONS))}")
        return expand_paths
    if not path.exists() and glob.has_magic(name):
        expand_paths = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not expand_paths:
            raise UserError(f"there is no {name!r}, nor anything that it fits as a pattern; ** stands for folders")
        return expand_paths
    return [path]


def _from_standard_input(folder: Path) -> list[tuple[str, Path]]:
    """An image, or names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if content.startswith(SIGNATURES) and not _is_text(content):
        path = folder / "image"
        path.write_bytes(content)
        return [(STANDARD_INPUT, path)]
    names = [line for line in os.fsdecode(content).splitlines() if line.strip()]
    if not names or any("\0" in name for name in names):
        raise UserError("standard input holds neither an image nor names of images, one per line")
    return [(str(path), path) for name in names for path in _expand(name)]


def _is_text(content: bytes) -> bool:
    """Whether it can be names that begin as a format's files do: BM, P5."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False

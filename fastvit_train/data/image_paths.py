"""Paths of images, from file names, folders, patterns or standard input."""

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
    """Yield (name to show, path) of every image file that `images` stands for, without checking the files.

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
        for name in images:
            if name == STANDARD_INPUT:
                files += _from_standard_input(Path(folder))
            else:
                files += [(str(path), path) for path in _expand(name)]
        yield files


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        paths = sorted(
            Path(parent) / file
            for parent, _, names in os.walk(path)
            for file in names
            if Path(file).suffix.lower() in EXTENSIONS
        )
        if not paths:
            raise UserError(f"folder {name} holds no images; allowed extensions: {' '.join(sorted(EXTENSIONS))}")
        return paths
    if not path.exists() and glob.has_magic(name):
        paths = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not paths:
            raise UserError(f"no file matches {name!r}; check its spelling (** matches any folders)")
        return paths
    return [path]


def _from_standard_input(folder: Path) -> list[tuple[str, Path]]:
    """Read an image, or the names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if content.startswith(SIGNATURES) and not _is_text(content):
        path = folder / "image"
        path.write_bytes(content)
        return [(STANDARD_INPUT, path)]
    names = [line for line in os.fsdecode(content).splitlines() if line.strip()]
    if not names or any("\0" in name for name in names):
        raise UserError("standard input holds neither an image nor names of images; write one name per line")
    return [(str(path), path) for name in names for path in _expand(name)]


def _is_text(content: bytes) -> bool:
    """Return True for text: names of files may begin with a format's signature too, such as BM or P5."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False

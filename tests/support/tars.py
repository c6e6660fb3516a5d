"""Data sets in WebDataset's format: tar files with an image and a class per sample."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.support.parquet import alternating, png


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file with these files, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """The files of samples whose classes are 0 and 1 by turns."""
    pairs = [
        [(f"{first + i:06}.png", png(first + i)), (f"{first + i:06}.cls", str(label).encode())]
        for i, label in enumerate(alternating(count))
    ]
    return [file for pair in pairs for file in pair]


def write(root: Path) -> Path:
    """Write 40 training images in two shards, and 10 test images."""
    write_tar(root / "train-0000.tar", samples(24))
    write_tar(root / "train-0001.tar", samples(16, 24))
    write_tar(root / "test-0000.tar", samples(10, 100))
    return root

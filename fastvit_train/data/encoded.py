"""Where encoded images are: in files of their own, in rows of tables, or in tar files."""

import tarfile
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import IO, Any, Literal, Protocol


class Table(Protocol):
    """Rows of a data set of the Hugging Face Hub, each with an image as bytes or as the path of a file."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """The image in a row of a table."""

    table: Table
    column: str
    index: int
    split: str

    def __str__(self) -> str:
        return f"row {self.index} of split {self.split}"

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the image's file."""
        image = self.table[self.index][self.column]
        if image is None:
            raise ValueError("it has no image")
        return Path(image["path"]).open("rb") if image["bytes"] is None else BytesIO(image["bytes"])


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an uncompressed tar file, where it is read without being unpacked."""

    archive: Path
    start: int
    """the first of its bytes in the tar file"""
    size: int

    def __str__(self) -> str:
        try:
            with self.archive.open("rb") as stream:
                stream.seek(self.start - tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "replace")
        except (OSError, tarfile.TarError):  # it was removed or changed since its headers were read
            return f"the image at byte {self.start:,} of {self.archive}"
        return f"{header.name} in {self.archive}"

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it as if it were a file of its own."""
        return BufferedReader(_Part(self.archive.open("rb"), self.start, self.size))


Source = Path | Row | Member


class _Part(RawIOBase):
    """Some of the bytes of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._position = offset + {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()

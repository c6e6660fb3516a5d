"""How files reach the disk whole: written beside, synced, renamed into place, and told from damaged ones."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from fastvit_train.utils.errors import SaveError, UserError
from fastvit_train.utils.safe_load import read_json

CHECKSUMS = "checksums.json"
TORCH_COULD_NOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""what torch.save's RuntimeErrors say when the disk is full"""


@contextmanager
def as_save_error(what: str) -> Iterator[None]:
    """What the disk refuses within becomes a SaveError: `what`, such as "no checkpoint could be written", and why."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, RuntimeError):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        elif any(word in str(error) for word in TORCH_COULD_NOT_WRITE):
            reason = "the disk took only a part of it"
        else:
            raise
        raise SaveError(f"{what} ({reason})") from None


def write_atomically(path: Path, text: str) -> None:
    """Write beside, sync, then rename into place: after a crash there is the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        publish(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Add `text` to a file, all of it or, where that fails, nothing."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def publish(partial: Path, final: Path) -> None:
    """Sync `partial`, a file, and rename it to `final`."""
    _sync(partial)
    partial.replace(final)
    _sync(final.parent)


def write_checksums(folder: Path) -> None:
    """Write the checksums of the files in `folder` beside them, and bring everything to the disk."""
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps({"files": sums}, indent=1))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that was sealed; None where it is whole. OSError where that can't be told."""
    try:
        sums = read_json(folder / CHECKSUMS)["files"]
        for name, expected in sums.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if _checksum(path) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} can't be read"
    return None


def publish_folder(partial: Path, final: Path) -> None:
    """Rename a sealed folder into place; `recover_interrupted` mends what a crash in the middle leaves."""
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A path near `final`, to write a file or a folder to; it is put in place at the end, unless something is raised.

    Raises:
        UserError: where `final` is a folder with something in it that would be lost.
        OSError: where it can't be written; then nothing is.
    """
    near = next(parent for parent in final.absolute().parents if parent.is_dir())
    with TemporaryDirectory(dir=near, prefix=".unfinished-") as folder:
        partial = Path(folder) / final.name
        yield partial
        if not partial.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            publish(partial, final)
            return
        there = {path.name for path in final.iterdir()} if final.exists() else set()
        if other := sorted(there - {path.name for path in partial.iterdir()}):
            raise UserError(f"{final} holds something else, such as {other[0]}; remove it, or choose another place")
        for path in partial.iterdir():
            _sync(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        publish_folder(partial, final)


def recover_interrupted(parent: Path) -> None:
    """Put back the folders of `parent` that a crash took away before the next was in place; drop unfinished ones."""
    for old in parent.glob(".*.old"):
        final = parent / old.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            old.rename(final)
    for leftover in (*parent.glob(".*.old"), *parent.glob(".*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)


def link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to its sibling `name`, atomically."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name, target_is_directory=True)
    fresh.replace(link)
    _sync(link.parent)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

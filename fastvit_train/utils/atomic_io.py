"""Atomic writes: files are written next to their place, synced and renamed, and checked by their checksums."""

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from fastvit_train.utils.errors import SaveError, UserError
from fastvit_train.utils.safe_load import read_json

CHECKSUMS = "checksums.json"
UNSUPPORTED = {
    getattr(errno, name)
    for name in ("EPERM", "EACCES", "EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOTTY", "EBADF", "EISDIR", "ENOLCK")
}
"""errors of a file system that cannot do what it is asked for: a link on exFAT, the sync of a folder on SMB, a lock"""
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TORCH_COULD_NOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
"""words in the RuntimeError that torch.save raises when the disk is full"""


@contextmanager
def as_save_error(what: str) -> Iterator[None]:
    """Raise errors of the disk as a SaveError: `what`, such as "no checkpoint could be written", and the reason."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, RuntimeError):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        elif any(word in str(error) for word in TORCH_COULD_NOT_WRITE):
            reason = "it was written only in part"
        else:
            raise
        raise SaveError(f"{what} ({reason})", disk_is_full=_means_full(error)) from None


def _means_full(error: Exception) -> bool:
    """Return whether the disk, or the user's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in DISK_IS_FULL
    if isinstance(error, RuntimeError):  # torch does not say why it could write only a part
        return True
    return any(f"(os error {number})" in str(error) for number in DISK_IS_FULL)  # safetensors


def write_atomically(path: Path, text: str) -> None:
    """Write a file as UTF-8 next to `path`, sync it and rename it: after a crash there is the old file or the new one.

    What UTF-8 does not have, such as bytes of a file's name that are not text, is escaped.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        publish(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Append `text` to a file as UTF-8, as `write_atomically` does; if that fails, the file is left as it was."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            _sync_open(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def publish(partial: Path, final: Path) -> None:
    """Sync the file `partial` and rename it to `final`, with the permissions of the umask."""
    apply_umask(partial)
    _sync(partial)
    partial.replace(final)
    _sync(final.parent)


def apply_umask(*paths: Path) -> None:
    """Give files of one folder the permissions of a new file: safetensors writes its own for the owner alone.

    A new file shows them, because reading the umask would change it for other threads for a moment.
    """
    new = paths[0].with_name(f".{os.getpid()}.partial")
    try:
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
    finally:
        new.unlink(missing_ok=True)
    for path in paths:
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(OSError):  # a disk without permissions
                path.chmod(mode)


def write_checksums(folder: Path) -> None:
    """Write the checksums of the files in `folder` into a file there, and sync all of them."""
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")
    apply_umask(*folder.iterdir())
    for path in (*folder.iterdir(), folder):
        _sync(path)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that has checksums; None if it is undamaged.

    Raises:
        OSError: if a file cannot be read now, which does not mean that it is damaged.
    """
    try:
        sums = read_json(folder / CHECKSUMS)["files"]
        for name, expected in sums.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if _checksum(path) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} can't be read"
    return None


def publish_folder(partial: Path, final: Path) -> None:
    """Rename the folder `partial`, whose files must be synced, to `final`.

    After a crash in between, call `recover_interrupted`.
    """
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, and rename it to `final` at the end, unless an error is raised.

    Raises:
        UserError: if `final` is a folder with files that would be lost.
        OSError: if it cannot be written; then nothing is written.
    """
    parent = next(parent for parent in final.absolute().parents if parent.is_dir())
    with TemporaryDirectory(dir=parent, prefix=".unfinished-") as folder:
        partial = Path(folder) / final.name
        yield partial
        if not partial.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            publish(partial, final)
            return
        existing = {path.name for path in final.iterdir()} if final.exists() else set()
        if other := sorted(existing - {path.name for path in partial.iterdir()}):
            raise UserError(f"{final} holds something else, such as {other[0]}; remove it, or choose another path")
        apply_umask(*partial.iterdir())
        for path in partial.iterdir():
            _sync(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        publish_folder(partial, final)


def recover_interrupted(parent: Path) -> None:
    """Finish what a crash in `publish_folder` left in `parent`: restore replaced folders, delete unfinished ones."""
    for old in parent.glob(".*.old"):
        final = parent / old.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            old.rename(final)
    for leftover in (*parent.glob(".*.old"), *parent.glob(".*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)


def link(path: Path, name: str) -> None:
    """Make `path` stand for its sibling `name`, atomically: `link_target` reads it.

    It becomes a symbolic link or, on Windows and on a disk without such links, a text file that holds the name.
    """
    temporary = path.with_name(f".{path.name}.link")
    remove(temporary)
    if not _can_link(temporary, name):
        temporary.write_text(name, encoding="utf-8")
        _sync(temporary)
    if path.is_dir() and not path.is_symlink():  # a copy of the run in which the link was followed
        remove(path)
    temporary.replace(path)
    _sync(path.parent)


def _can_link(path: Path, name: str) -> bool:
    """Make `path` a symbolic link, if there are such links and a later one can take its place."""
    if sys.platform == "win32":  # it has them for some users, but cannot rename a file over one that leads to a folder
        return False
    try:
        path.symlink_to(name, target_is_directory=True)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def link_target(path: Path) -> Path | None:
    """Return the sibling that `path`, as `link` made it, stands for; None if it does not stand for one that exists."""
    try:
        if path.is_symlink():
            name = path.readlink().name
        elif path.is_file():
            name = path.read_text(encoding="utf-8").strip()
        else:
            return None
        target = path.with_name(name)
        return target if target.exists() else None
    except (OSError, ValueError):  # such as a file that holds something else
        return None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to the disk, if it can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in UNSUPPORTED:  # Windows cannot open folders
            return
        raise
    try:
        _sync_open(descriptor)
    finally:
        os.close(descriptor)


def _sync_open(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise

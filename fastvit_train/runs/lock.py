"""The lock of a run's folder: only one process at a time trains into it."""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fastvit_train.utils.atomic_io import UNSUPPORTED, apply_umask
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_json

LOCK, HOLDER = ".lock", ".holder.json"
FILES = frozenset({LOCK, HOLDER})
WAIT_FOR_CHECKS = 1.0
"""seconds to wait for a process that only checks whether the lock is held"""
WAIT_FOR_ORPHANS = 15.0
"""seconds to wait for the data-loading children of a killed process, which hold its lock until they end"""


class LockedError(UserError):
    """Another process trains into the folder."""


class RunLock:
    """Lock of a run's folder; the operating system releases it when the process ends, even if it is killed.

    On a disk without locks, the file that names the holder stands in for the lock: it keeps other processes of this
    machine out.

    Args:
        root: the run's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = FileLock(root / LOCK, timeout=0, thread_local=False)
        self._acquired = False

    def check_free(self) -> None:
        """Raise UserError if another process holds the lock; nothing is written."""
        if (self._root / LOCK).is_file():
            with suppress(OSError):  # a folder that cannot be written is reported by `acquire`
                self._take()
                self._lock.release()

    def acquire(self) -> list[str]:
        """Acquire the lock; returns messages if a dead process left it behind, or if the disk has no locks.

        Raises:
            UserError: if another process holds it.
            OSError: if the folder cannot be written.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        self._take()
        apply_umask(self._root / LOCK)
        stale = read_holder(self._root)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
        (self._root / HOLDER).write_text(json.dumps(own), encoding="utf-8")
        self._acquired = True
        messages = []
        if not self._lock.is_locked:
            messages.append(f"the disk of {self._root} has no locks: train into it on one machine at a time")
        if stale is not None:
            who = f"process {stale['pid']} on {stale['host']}"
            messages.append(f"took over the lock of {who}, which ended without releasing it")
        return messages

    def release(self) -> None:
        """Release the lock if this process holds it."""
        if self._acquired:
            (self._root / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._acquired = False

    def _take(self) -> None:
        if not _can_lock(self._root / LOCK):
            holder = read_holder(self._root)
            if holder and holder["host"] == socket.gethostname() and not has_ended(holder):
                raise LockedError(self._held_by(holder))
            return
        started = time.monotonic()
        while True:
            try:
                self._lock.acquire()
                return
            except Timeout:
                holder = read_holder(self._root)
                max_wait = WAIT_FOR_ORPHANS if holder and has_ended(holder) else WAIT_FOR_CHECKS
                if time.monotonic() - started > max_wait:
                    raise LockedError(self._held_by(holder)) from None
            time.sleep(0.2)

    def _held_by(self, holder: dict[str, Any] | None) -> str:
        who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
        return f"{self._root} is being trained by {who}; wait for it, or choose another --exp-name"


def read_holder(root: Path) -> dict[str, Any] | None:
    """Return which process holds the lock of a run's folder, or held it last without releasing it; None if unknown.

    It is named by `pid`, `host` and `started`. Nothing is written, and the lock is left alone.
    """
    try:
        holder = read_json(root / HOLDER)
        return {key: holder[key] for key in ("pid", "host", "started")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _can_lock(path: Path) -> bool:
    """Return whether the disk has locks: versions of filelock differ in what they do if it has none."""
    try:
        import fcntl
    except ImportError:  # Windows, where every disk has them
        return True
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in UNSUPPORTED - {errno.EACCES}  # SMB's word for a lock that another process holds
    return True


def has_ended(holder: dict[str, Any]) -> bool:
    """Return whether the process that `read_holder` names ran on this machine and has ended."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        return psutil.Process(int(str(holder["pid"]))).create_time() != holder["started"]
    except (psutil.NoSuchProcess, ValueError):
        return True
    except psutil.Error:  # it runs, but belongs to another user
        return False

"""One process at a time trains into a folder."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_json

LOCK, HOLDER = ".lock", ".holder.json"
FILES = frozenset({LOCK, HOLDER})
WAIT_FOR_CHECKS = 1.0
"""seconds: another process may only look whether the lock is held"""
WAIT_FOR_ORPHANS = 15.0
"""seconds: a killed process's data-loading children hold its lock until they notice"""


class RunLock:
    """A run folder's lock: the system's own, which ends with the process that holds it, however that ends.

    Args:
        root: the run's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = FileLock(root / LOCK, timeout=0, thread_local=False)

    def check_free(self) -> None:
        """Raise UserError where another process holds the lock; nothing is written."""
        if (self._root / LOCK).is_file():
            with suppress(OSError):  # what can't be written is told where it is to be written
                self._take()
                self._lock.release()

    def acquire(self) -> list[str]:
        """Take the lock; returns what is to be said: a line where one that died left it.

        Raises:
            UserError: where another process holds it.
            OSError: where the folder can't be written.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        self._take()
        stale = self._holder()
        own = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
        (self._root / HOLDER).write_text(json.dumps(own))
        if stale is None:
            return []
        who = f"process {stale['pid']} on {stale['host']}"
        return [f"the lock of {who}, which ended without letting go, is taken over"]

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._lock.is_locked:
            (self._root / HOLDER).unlink(missing_ok=True)
            self._lock.release()

    def _take(self) -> None:
        started = time.monotonic()
        while True:
            try:
                self._lock.acquire()
                return
            except Timeout:
                holder = self._holder()
                patience = WAIT_FOR_ORPHANS if holder and _ended(holder) else WAIT_FOR_CHECKS
                if time.monotonic() - started > patience:
                    raise UserError(self._refusal(holder)) from None
            time.sleep(0.2)

    def _refusal(self, holder: dict[str, object] | None) -> str:
        who = "another process" if holder is None else f"process {holder['pid']} on {holder['host']}"
        return f"{self._root} is being trained by {who}; wait for it, or choose another --exp-name"

    def _holder(self) -> dict[str, object] | None:
        """Who holds the lock or held it last without letting go; None where that isn't known."""
        try:
            holder = read_json(self._root / HOLDER)
            return {key: holder[key] for key in ("pid", "host", "started")}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _ended(holder: dict[str, object]) -> bool:
    """True where the holder ran on this machine and doesn't any more."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        return psutil.Process(int(str(holder["pid"]))).create_time() != holder["started"]
    except (psutil.NoSuchProcess, ValueError):
        return True
    except psutil.Error:  # it is there, but not ours to ask
        return False

"""The runs in a folder with their states and results, for a page that asks for them every few seconds."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from fastvit_train.runs.comparison import MISSING, format_result
from fastvit_train.runs.lock import HOLDER, has_ended, read_holder
from fastvit_train.runs.results import INVALID, RUN_FILES, RunResults, read_results
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils.errors import UserError, printable

COLUMNS = ("model", "data", "epochs", "train loss", "test loss", "accuracy", "images/s")
"""rows of a comparison that the list shows as columns"""
REPORT = "report.html"
MAX_DEPTH = 2
"""folders between the one that is watched and a run: a sweep keeps its runs in a folder of its own"""

State = Literal["training", "finished", "stopped", "killed", "damaged"]
Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class ListedRun:
    """A run as the list shows it."""

    id: str
    """names the run in addresses: a folder's name may hold what no address can"""
    name: str
    folder: Path
    version: str
    """changes whenever one of the run's files does"""
    started: float
    changed: float
    """the times at which the run was started and a file of it was written last, in seconds since 1970"""
    state: State
    cells: dict[str, str]
    """the value of each of COLUMNS"""
    note: str
    """what a reader must know about the run, such as its damage; often empty"""

    def as_json(self) -> dict[str, Any]:
        """Return what the page shows."""
        shown = ("id", "name", "version", "changed", "state", "note")
        return {**{key: getattr(self, key) for key in shown}, "cells": [self.cells[key] for key in COLUMNS]}


class RunList:
    """The runs below a folder; what they hold is read again only if the time or the size of one of their files changes.

    Args:
        root: the folder. What a symbolic link in it finds outside of it is not shown.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._contents: dict[Path, tuple[list[Stamp], bool, dict[str, str], str]] = {}
        self._lock = Lock()

    def read(self) -> list[ListedRun]:
        """Return the runs: those in training first, then the one that was started last; nothing is written."""
        with self._lock:
            found = dict(self._folders(self.root))
            self._contents = {folder: known for folder, known in self._contents.items() if folder in found}
            runs = [self._describe(folder, stamps) for folder, stamps in found.items()]
        return sorted(runs, key=lambda run: (run.state != "training", -run.started, run.name))

    def find(self, ids: list[str]) -> list[ListedRun]:
        """Return the runs with these ids, in this order.

        Raises:
            FileNotFoundError: if one of the ids belongs to no run.
        """
        runs = {run.id: run for run in self.read()}
        if missing := [one for one in ids if one not in runs]:
            raise FileNotFoundError(f"no run has the id {missing[0]}")
        return [runs[one] for one in ids]

    def report(self, run: ListedRun) -> Path | None:
        """Return the report in a run's folder; None if there is none, or if the run was trained after it."""
        path = run.folder / REPORT
        written, trained = _stamp(path), _stamp(RunFolder(run.folder).metrics)
        is_current = written is not None and (trained is None or written[0] >= trained[0])
        return path if is_current and path.is_file() and self._holds(path) else None

    def _folders(self, parent: Path, depth: int = 1) -> Iterator[tuple[Path, list[Stamp]]]:
        """Yield the folder of each run below `parent`, with the stamps of its files."""
        with suppress(OSError), os.scandir(parent) as entries:  # the folder cannot be read, or was removed
            for entry in entries:
                folder = parent / entry.name
                if (
                    entry.name.startswith(".")
                    or not _is_folder(entry)
                    or (entry.is_symlink() and not self._holds(folder))
                ):
                    continue
                stamps = [_stamp(path) for path in _files(folder)]
                if any(stamps[: len(RUN_FILES)]):
                    yield folder, stamps
                elif depth < MAX_DEPTH:
                    yield from self._folders(folder, depth + 1)

    def _holds(self, path: Path) -> bool:
        """Return whether a path, with the links in it followed, is in the folder that is watched."""
        try:
            return path.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError):  # RuntimeError: up to Python 3.12, a link that leads to itself
            return False

    def _describe(self, folder: Path, stamps: list[Stamp]) -> ListedRun:
        known = self._contents.get(folder)
        if known is None or known[0] != stamps:
            known = self._contents[folder] = (stamps, *self._read_contents(folder))
        _, finished, cells, note = known
        state, host = _state(folder, finished)
        times = [stamp[0] / 1e9 for stamp in stamps if stamp is not None]
        relative = folder.relative_to(self.root)
        return ListedRun(
            id=digest(os.fsencode(relative)),
            name=printable(str(relative)),
            folder=folder,
            version=digest(repr(stamps).encode()),
            started=stamps[0][0] / 1e9 if stamps[0] else max(times),
            changed=max(times),
            state="damaged" if note else state,
            cells=cells,
            note=note or host,
        )

    def _read_contents(self, folder: Path) -> tuple[bool, dict[str, str], str]:
        """Return whether a run is finished, the value of each column, and what is wrong with its files, if anything."""
        empty = dict.fromkeys(COLUMNS, MISSING)
        if outside := [path for path in _files(folder) if not self._holds(path)]:
            return False, empty, f"{outside[0].name} is a symbolic link out of {printable(str(self.root))}"
        try:
            run = RunResults(folder.name, folder, read_results(folder), settings={}, evaluation={})
            return run.finished, {name: format_result(name, run) for name in COLUMNS}, ""
        except (UserError, OSError, *INVALID) as error:
            return False, empty, str(error)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether `entry` is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    """Return the files that tell how a run is doing: RUN_FILES, others, and the one that names who holds the lock."""
    run = RunFolder(folder)
    return [*(folder / name for name in RUN_FILES), run.steps, run.evaluation, folder / HOLDER]


def _stamp(path: Path) -> Stamp:
    """Return what changes with a file: the time of its last change in nanoseconds, its size and its number."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _state(folder: Path, finished: bool) -> tuple[State, str]:
    """Return the state of a run, and a note if another machine trains it: whether that one still does is unknown."""
    holder = read_holder(folder)
    if holder is not None and not has_ended(holder):
        elsewhere = holder["host"] != socket.gethostname()
        return "training", f"in training on {printable(str(holder['host']))}" if elsewhere else ""
    if finished:
        return "finished", ""
    return "stopped" if holder is None else "killed", ""


def digest(content: bytes) -> str:
    """Return a short name of `content`."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()

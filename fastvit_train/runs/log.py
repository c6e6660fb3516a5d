"""Lines that a run writes while it trains: to the terminal, to train.log and to .jsonl files."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvit_train.utils import atomic_io
from fastvit_train.utils.console import Terminal


class MetricsBuffer:
    """Buffer of JSON lines for files; lines that could not be written to a full disk are kept for the next `flush`."""

    def __init__(self) -> None:
        self._lines: list[tuple[Path, str]] = []

    def add(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Queue `rows`: the next `flush` appends them to `path`."""
        self._lines.append((path, "".join(json.dumps(row) + "\n" for row in rows)))

    def flush(self) -> None:
        """Write all queued lines; on an OSError, the lines that were not written stay queued."""
        while self._lines:
            atomic_io.append(*self._lines[0])
            self._lines.pop(0)


class Log:
    """Lines in the terminal and, after `attach`, in a file too; only rank 0 writes."""

    def __init__(self, enabled: bool) -> None:
        self.console = Terminal(quiet=not enabled, soft_wrap=True)
        self.enabled = enabled
        self.prefix = ""
        """begins the lines in the terminal: which of several runs they are about"""
        self._path: Path | None = None

    def attach(self, path: Path) -> None:
        self._path = path

    def line(self, text: str) -> None:
        self.console.print(f"{self.prefix}{text}", markup=False)
        if self.enabled and self._path is not None:
            with suppress(OSError):  # a full disk is reported when a checkpoint cannot be written
                atomic_io.append(self._path, text + "\n")

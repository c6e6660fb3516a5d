"""Lines that a run writes along the way: to the terminal, to train.log, to .jsonl files."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvit_train.utils import atomic_io
from fastvit_train.utils.console import Terminal


class Journal:
    """Lines of JSON on their way to a file; those that a full disk does not take are kept for the next time."""

    def __init__(self) -> None:
        self._lines: list[tuple[Path, str]] = []

    def add(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Have `rows` written to the end of `path` by the next `flush`."""
        self._lines.append((path, "".join(json.dumps(row) + "\n" for row in rows)))

    def flush(self) -> None:
        """Write what there is; OSError where the disk doesn't take it, and then what was not written stays here."""
        while self._lines:
            atomic_io.append(*self._lines[0])
            self._lines.pop(0)


class Log:
    """Plain lines in the terminal and, from `attach` on, in a file; silent on all ranks but 0."""

    def __init__(self, speaks: bool) -> None:
        self.console = Terminal(quiet=not speaks, soft_wrap=True)
        self.speaks = speaks
        self._path: Path | None = None

    def attach(self, path: Path) -> None:
        self._path = path

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)
        if self.speaks and self._path is not None:
            with suppress(OSError):  # a full disk: what matters more is told where it is written
                atomic_io.append(self._path, text + "\n")

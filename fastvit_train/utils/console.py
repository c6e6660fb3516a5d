"""The terminal that lines and tables go to."""

from typing import Any, NoReturn

from rich.console import Console


class Terminal(Console):
    """rich's console without highlighting and without an immediate exit when the reader of a pipe stops reading."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raise again the BrokenPipeError that is being handled: the command line handles it and exits cleanly."""
        raise

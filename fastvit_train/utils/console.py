"""The terminal that lines and tables go to."""

from typing import Any, NoReturn

from rich.console import Console


class Terminal(Console):
    """rich's console; whoever reads the output may stop, which rich would end the process at once for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Called while BrokenPipeError is handled: hand it on, to where the command ends in order."""
        raise

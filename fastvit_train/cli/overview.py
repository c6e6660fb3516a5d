"""What `--help` without a verb says: a screen of it."""

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

WIDTH = 80


def summary(takes: type[Any]) -> str:
    """The first line of what a verb is documented by, without its full stop."""
    return (inspect.getdoc(takes) or "").partition("\n")[0].removesuffix(".")


def overview(program: str, verbs: Mapping[str, type[Any]]) -> Group:
    """The verbs, a line each, and how they are called; at most 80 columns wide.

    Args:
        program: as it was called.
        verbs: what each takes, by name.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    longest = max(map(len, verbs))
    for name, takes in verbs.items():
        line = textwrap.shorten(summary(takes), WIDTH - longest - 4, placeholder=" ...")
        table.add_row(Text(f"  {name}", "cyan"), Text(line))
    return Group(
        Text(f"usage: {program} [VERB] [FLAGS]\n", "bold"),
        Text("Trains small Vision Transformers from scratch on small images.\n"),
        table,
        Text(f"\nFlags without a verb are train's: {program} --epochs 8"),
        Text(f"{program} VERB --help lists what a verb takes."),
    )

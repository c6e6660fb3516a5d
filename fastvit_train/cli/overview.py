"""The help of the whole program, which fits on one screen."""

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

WIDTH = 80


def summary(takes: type[Any]) -> str:
    """The first line of a verb's docstring, without its full stop."""
    return (inspect.getdoc(takes) or "").partition("\n")[0].removesuffix(".")


def overview(program: str, verbs: Mapping[str, type[Any]]) -> Group:
    """Lay out the program's usage and one line per verb, at most 80 columns wide.

    Args:
        program: the program as the user called it.
        verbs: the verbs' dataclasses by name.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    longest = max(map(len, verbs))
    for name, takes in verbs.items():
        line = textwrap.shorten(summary(takes), WIDTH - longest - 4, placeholder=" ...")
        table.add_row(Text(f"  {name}", "cyan"), Text(line))
    return Group(
        Text(f"usage: {program} [VERB] [FLAGS]\n", "bold"),
        Text("Train small Vision Transformers from scratch on small images.\n"),
        table,
        Text(f"\nWithout a verb, flags are passed to train: {program} --epochs 8"),
        Text(f"{program} VERB --help lists the flags of a verb."),
    )

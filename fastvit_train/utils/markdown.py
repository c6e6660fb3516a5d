"""Markdown made of texts that come from elsewhere."""

import re
from collections.abc import Sequence

from fastvit_train.utils.errors import printable


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown texts, the first row its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def text(value: object) -> str:
    """`value` as Markdown shows it unchanged, in a line or in a table."""
    # An underscore within a word marks nothing, and most names have one.
    return re.sub(r"([\\`*{}\[\]<>#|&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(str(value)))


def code(name: str) -> str:
    """`name` between backquotes, which nothing in it ends."""
    return printable(name).replace("`", "'")

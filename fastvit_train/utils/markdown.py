"""Markdown from untrusted text."""

import re
from collections.abc import Sequence

from fastvit_train.utils.errors import printable


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the header, and cells are Markdown."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def text(value: object) -> str:
    """Return `value` escaped, so that Markdown shows it unchanged in a line or in a table."""
    # An underscore within a word is not markup, and most names have one.
    return re.sub(r"([\\`*{}\[\]<>#|&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(str(value)))


def code(name: str) -> str:
    """Return `name` without backquotes, for use between backquotes."""
    return printable(name).replace("`", "'")

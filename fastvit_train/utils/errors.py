"""What a user did wrong, as opposed to what we did wrong; and text from elsewhere, fit to be shown."""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_LETTERS = 32_000
SHORTEST_PART = 3
"""of a name that tells which one is meant"""


def printable(text: str) -> str:
    """`text` with all that is no visible letter escaped: what moves the cursor, ends the line or can't be encoded."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def nearest(name: str, allowed: Iterable[str], most: int = 2) -> list[str]:
    """Those of the allowed names that `name` may be meant for: what it begins, is spelt like, or is a part of."""
    names = list(allowed)
    telling = len(name.strip("-")) >= SHORTEST_PART
    begun = [other for other in names if telling and other.startswith(name)]
    within = [other for other in names if telling and name in other]
    return begun[:most] or get_close_matches(name, names, n=most) or within[:most]


def did_you_mean(name: str, allowed: Iterable[str], most: int = 2) -> str:
    """` (did you mean a or b?)` for the names that are `nearest`; nothing where none is near."""
    close = nearest(name, allowed, most)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


class UserError(Exception):
    """A mistake in the input: one line with the value, what is allowed, and what to do next.

    The command line prints it alone, without a traceback, and exits with status 2.

    Args:
        message: that line; what comes from the input may be in it as it is, it is made printable and cut.
        on_all_ranks: True where every process meets the mistake, so that one of them is enough to tell it.
    """

    def __init__(self, message: str, on_all_ranks: bool = True) -> None:
        line = printable(" ".join(message.split()))
        super().__init__(line if len(line) <= MAX_LETTERS else f"{line[:MAX_LETTERS]} ... ({len(line)} letters)")
        self.on_all_ranks = on_all_ranks


class SaveError(UserError):
    """The disk took something not, or not whole; what was written before is as it was."""


class Preempted(Exception):
    """A signal stopped the run after its checkpoint was written; the message is one line for the user."""

    exit_status = 75
    """EX_TEMPFAIL of sysexits.h: the run is not finished and has not failed; --resume auto continues it"""

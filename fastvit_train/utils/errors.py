"""Errors that the user can correct, and words for messages: safe to print, in singular or plural, near a name."""

from collections.abc import Iterable
from difflib import get_close_matches

MAX_LENGTH = 32_000
MIN_PREFIX_LENGTH = 3
"""letters of a name that are enough to suggest the whole name"""


def printable(text: str) -> str:
    """Escape all characters of `text` that cannot be printed, move the cursor, end the line or cannot be encoded."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def counted(number: int | str, noun: str) -> str:
    """Return a number with its noun: "1 epoch", "2 epochs", "1,000 classes".

    Args:
        number: a number, or the text of one.
        noun: its singular.
    """
    figure = number if isinstance(number, str) else f"{number:,}"
    if figure == "1":
        return f"{figure} {noun}"
    return f"{figure} {noun}{'es' if noun.endswith(('s', 'x', 'sh', 'tch')) else 's'}"


def nearest(name: str, allowed: Iterable[str], most: int = 2) -> list[str]:
    """Return the allowed names that `name` may stand for: it is their beginning, spelt like them, or part of them."""
    names = list(allowed)
    is_long_enough = len(name.strip("-")) >= MIN_PREFIX_LENGTH
    begun = [other for other in names if is_long_enough and other.startswith(name)]
    within = [other for other in names if is_long_enough and name in other]
    return begun[:most] or get_close_matches(name, names, n=most) or within[:most]


def did_you_mean(name: str, allowed: Iterable[str], most: int = 2) -> str:
    """Return ` (did you mean a or b?)` for the names that are `nearest`; empty if there is none."""
    close = nearest(name, allowed, most)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


class UserError(Exception):
    """A mistake in the input: one line with the value, what is allowed, and what to do next.

    The command line prints it alone, without a traceback, and exits with status 2.

    Args:
        message: the line. It may contain parts of the input: it is made printable and cut to MAX_LENGTH.
        on_all_ranks: whether all ranks raise the error, so that rank 0 alone prints it.
    """

    def __init__(self, message: str, on_all_ranks: bool = True) -> None:
        line = printable(" ".join(message.split()))
        super().__init__(line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]} ... ({len(line)} characters)")
        self.on_all_ranks = on_all_ranks


class SaveError(UserError):
    """A file could not be written, or not completely; the files that were there before are unchanged.

    Args:
        message: the line, as for `UserError`.
        disk_is_full: whether there is no room for the file, or no more room for this user's files.
    """

    def __init__(self, message: str, *, disk_is_full: bool = False) -> None:
        super().__init__(message)
        self.disk_is_full = disk_is_full


class Preempted(Exception):
    """A signal stopped the run after its checkpoint was written; the message is one line for the user."""

    exit_status = 75
    """EX_TEMPFAIL of sysexits.h: the run is not finished and has not failed; --resume auto continues it"""


class Interrupted(KeyboardInterrupt):
    """As `Preempted`, for SIGINT (Ctrl-C): what Python code around a run expects of Ctrl-C is KeyboardInterrupt."""

    exit_status = Preempted.exit_status

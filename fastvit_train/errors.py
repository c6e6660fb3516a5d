"""What a user did wrong, as opposed to what we did wrong; and text from elsewhere, fit to be shown."""

MAX_LETTERS = 32_000


def printable(text: str) -> str:
    """`text` with all that is no visible letter escaped: what moves the cursor, ends the line or can't be encoded."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class UserError(Exception):
    """A mistake in the input: one line with the value, what is allowed, and what to do next.

    The command line prints it alone, without a traceback, and exits with status 2.

    Args:
        message: that line; what comes from the input may be in it as it is, it is made printable and cut.
        everywhere: True where every process meets the mistake, so that one of them is enough to tell it.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        line = printable(" ".join(message.split()))
        super().__init__(line if len(line) <= MAX_LETTERS else f"{line[:MAX_LETTERS]} ... ({len(line)} letters)")
        self.everywhere = everywhere


class SaveError(UserError):
    """The disk took something not, or not whole; what was written before is as it was."""

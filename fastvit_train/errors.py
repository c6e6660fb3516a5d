"""What a user did wrong, as opposed to what we did wrong."""


class UserError(Exception):
    """A mistake in the input: one line with the value, what is allowed, and what to do next.

    The command line prints it alone, without a traceback, and exits with status 2.

    Args:
        message: that line.
        everywhere: True where every process meets the mistake, so that one of them is enough to tell it.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class SaveError(UserError):
    """The disk took something not, or not whole; what was written before is as it was."""

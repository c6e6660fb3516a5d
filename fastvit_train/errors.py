"""What a user did wrong, as opposed to what we did wrong."""


class UserError(Exception):
    """A mistake in the input: one line with the value, what is allowed, and what to do next.

    The command line prints it alone, without a traceback, and exits with status 2.
    """

"""Errors that no verb expects: one line each, with the traceback in a file."""

import contextlib
import os
import sys
import tempfile
import threading
import traceback
from _thread import interrupt_main
from collections.abc import Callable, Iterator

MAX_LENGTH = 300
"""letters of an error's message that the line shows; torch's compiler adds pages"""


def describe(error: BaseException) -> str:
    """Describe an unexpected error in one line, and write its traceback into a file that the line names."""
    message = " ".join(str(error).split())
    if len(message) > MAX_LENGTH:
        message = f"{message[:MAX_LENGTH]} ..."
    place = traceback.extract_tb(error.__traceback__)
    where = f" in {os.path.basename(place[-1].filename)}, line {place[-1].lineno}" if place else ""
    reason = f"{type(error).__name__}{where}: {message or 'no message'}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fastvit-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        traceback.print_exception(error)
        return reason
    return f"{reason}; the traceback is in {file.name}"


def lost_another_rank(error: Exception) -> bool:
    """Whether an error only says that another rank has ended, which reports its own error."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


@contextlib.contextmanager
def stop_on_thread_errors(print_error: Callable[[str], None]) -> Iterator[None]:
    """Let an error that a thread does not handle stop the run, as Ctrl-C does, instead of ending only the thread."""

    def stop(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or issubclass(failed.exc_type, SystemExit):
            return
        name = failed.thread.name if failed.thread else "unknown"
        print_error(f"thread {name}: {describe(failed.exc_value)}")
        interrupt_main()

    before, threading.excepthook = threading.excepthook, stop
    try:
        yield
    finally:
        threading.excepthook = before

"""Make malformed inputs, and run the command line on them."""

import contextlib
import io
import re
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
import hypothesis
from hypothesis import strategies as st

from fastvit_train.cli.main import main
from tests.support import one_line_error

MALFORMED = "malformed inputs, each one line and status 2"
SECONDS_PER_INPUT = 60  # an answer takes less than one; a busy machine may need more, a hang takes forever
# Input is read and checked before anything is written, so an input that gets as far as this error was well-formed.
NOT_WRITABLE = "/dev/null/runs"
WELL_FORMED = re.compile("can't write .*/dev/null/runs/")
TINY = (
    *("--depth", "1", "--embed-dim", "8", "--num-heads", "1", "--patch-size", "16", "--attention", "fused"),
    *("--epochs", "1", "--batch-size", "1000", "--no-telemetry"),
)


def some_or_many(name: str, some: int, many: int) -> pytest.MarkDecorator:
    """The number of inputs to try, as the argument `name`: `some` by -m slow, `many` by -m soak."""
    slow, soak = pytest.mark.slow, pytest.mark.soak
    return pytest.mark.parametrize(name, [pytest.param(some, marks=slow), pytest.param(many, marks=soak)])


class TooSlow(BaseException):
    """Not an Exception, so that no handler mistakes it for a damaged file."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooSlow if the block takes longer than `seconds`."""

    def stop(*_: object) -> None:
        raise TooSlow(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def error_line(*args: object) -> str | None:
    """Run the command, and return its error message, one line; None if it found the input well-formed.

    Fails on a traceback, an exit status other than 2, a second line, a control character, and a hang.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            within(SECONDS_PER_INPUT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error", UserWarning)  # a warning would be another line
            warnings.simplefilter("error", RuntimeWarning)
            main([str(arg) for arg in args])
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        assert stop.code == 2, (args, stop.code, err.getvalue())
    else:
        return None
    line = one_line_error(err.getvalue())
    assert err.getvalue() == f"fastvit_train: error: {line}\n" and line.isprintable(), (args, err.getvalue())
    return None if WELL_FORMED.match(line) else line


def is_refused(count: Callable[..., None], *args: object) -> bool:
    """Run the command, and return True if it found the input malformed, which is counted."""
    line = error_line(*args)
    if line is not None:
        count(MALFORMED)
    return line is not None


def check_examples(strategy: st.SearchStrategy[Any], examples: int, seed: int, check: Callable[[Any], None]) -> None:
    """Call `check` with `examples` inputs from hypothesis, the same ones for the same seed."""
    quiet = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    hypothesis.seed(seed)(quiet(hypothesis.given(strategy)(lambda value: check(value))))()


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for `content` with one to three changes, most of them near its start, where headers are."""
    offsets = st.one_of(st.integers(0, min(64, len(content) - 1)), st.integers(0, len(content) - 1))
    extremes = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    lies = [struct.pack(f"{order}I", value) for order in "<>" for value in extremes]
    change = st.one_of(
        st.tuples(st.just("cut"), offsets, st.none()),
        st.tuples(st.just("flip"), offsets, st.integers(0, 7)),
        st.tuples(st.just("overwrite"), offsets, st.sampled_from(lies) | st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("insert"), offsets, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("remove"), offsets, st.integers(1, 32)),
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _changed(content, changes))


def _changed(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    data = bytearray(content)
    for what, offset, how in changes:
        if what == "cut":
            del data[offset:]
        elif what == "flip" and offset < len(data):
            data[offset] ^= 1 << how
        elif what == "overwrite":
            data[offset : offset + len(how)] = how
        elif what == "insert":
            data[offset:offset] = how
        elif what == "remove":
            del data[offset : offset + how]
    return bytes(data)


class Evil:
    """A pickle that creates the file `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self._marker)!r}, 'w')",)

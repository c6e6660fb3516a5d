"""Imports that take seconds, without the garbage collector; this module imports nothing heavy itself."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def slow_imports() -> Iterator[None]:
    """Import within this context without garbage collection; later collections leave out what exists by then.

    torch and what builds on it are a million objects that stay. The collector would look through them again and again
    while they are imported, during the run and when the process ends: a third of the time of a short run. A context in
    which nothing new is imported excludes nothing.
    """
    modules, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if collecting:
            gc.enable()

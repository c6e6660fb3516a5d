"""The server of `watch` in a thread of the test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from fastvit_train.inference.watch.listing import RunList
from fastvit_train.inference.watch.server import WatchServer


@contextmanager
def serving(root: Path) -> Iterator[WatchServer]:
    """Serve the page about the runs in `root` inside the context."""
    with WatchServer(RunList(root), 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()

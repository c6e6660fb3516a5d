"""The private parts of torch that fastvit_train relies on, each with the reason why nothing public serves.

`tests/utils/test_torch_private.py` shows on the oldest and the newest torch of CI that they behave as relied upon.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

# The base class of modes that see every operator call, from Python and from C++. Its docstring invites others to
# derive from it, but it is only available from this module.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.data._utils import signal_handling


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Make this process rank 0 of a process group whose other ranks do not exist; its collectives move nothing.

    torch.distributed lists "fake" among its backends, but only torch's testing module registers it.

    Raises:
        ValueError: if the default process group exists already.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    dist.init_process_group("fake", rank=0, world_size=world_size, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def forget_workers(iterator: Any) -> None:
    """Keep the processes of a DataLoader's iterator from torch's handler of SIGCHLD, which raises an error for them.

    Nothing public does: torch installs the handler with the first DataLoader of a process, and it stays.
    """
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def count_compiled_graphs() -> int:
    """Count the graphs that torch.compile has compiled in this process. No public function returns this count."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_graph_breaks() -> int:
    """Count the graph breaks of torch.compile in this process. No public function returns this count."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Let torch.compile compile each function up to `limit` times within the context.

    Beyond the limit a function silently runs uncompiled. The public argument of the same name of torch.compile is
    missing in the oldest torch that is supported.
    """
    return torch._dynamo.config.patch(recompile_limit=limit)


def current_scale(scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Return the scale of a scaler that has scaled a loss, a scalar on the device that `update()` changes in place.

    The public `get_scale()` makes the host wait for the device.
    """
    assert scaler._scale is not None, "the scaler has not scaled a loss yet"
    return scaler._scale

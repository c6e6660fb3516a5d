"""How a pass is timed: by the host's clock, or by CUDA events around replays of its CUDA graph."""

import time
from collections.abc import Callable
from typing import Any

import torch

from fastvit_kernels.cuda_graph import record_graph

Timer = Callable[[], float]
"""runs a pass once or more; returns the milliseconds of one"""
GPU_CALLS = 10
"""passes between two synchronisations; a synchronisation takes longer than a pass of a few microseconds"""


# fastvit_train.utils.timing has this too; but the kernels work alone, and the import order forbids it here.
def host_timer(run: Callable[[], object], device: torch.device) -> Timer:
    """Return a timer of calls of `run`: what they take on the device or on the host, whichever is longer."""
    calls = 1 if device.type == "cpu" else GPU_CALLS

    def milliseconds() -> float:
        _synchronize(device)
        before = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        return (time.perf_counter() - before) / calls * 1e3

    return milliseconds


def graph_timer(run: Callable[[], object], device: torch.device, pool: Any) -> Timer:
    """Capture `run` in a CUDA graph, and return a timer of its replays: what the kernels take on the device.

    Args:
        run: launches kernels on the current stream, with the same shapes and addresses each time.
        device: a CUDA device.
        pool: memory pool of the graph, from `torch.cuda.graph_pool_handle`. Graphs can share one if nobody reads their
            results.

    Raises:
        RuntimeError: if `run` does what a capture forbids, such as a synchronisation.
    """
    with torch.cuda.device(device):
        graph = record_graph(run, pool)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds() -> float:
        with torch.cuda.device(device):
            graph.replay()  # while it runs, the host gets ahead of the device
            start.record()
            for _ in range(GPU_CALLS):
                graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / GPU_CALLS

    return milliseconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

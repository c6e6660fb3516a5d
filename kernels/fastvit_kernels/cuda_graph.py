"""Recording work of a GPU as a CUDA graph, which the host launches with one call."""

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3
"""calls before the recording, in which libraries allocate their workspaces and kernels are compiled"""


def record_graph(run: Callable[[], object], pool: Any | None = None) -> torch.cuda.CUDAGraph:
    """Call `run` a few times, then record another call, which does not execute; `replay()` of the graph executes it.

    Args:
        run: work on the current GPU that reads and writes the same memory on every call. It must not make the host wait
            for the GPU.
        pool: memory pool of the graph, from `torch.cuda.graph_pool_handle`, by default one of its own. Graphs can share
            a pool if nobody reads their results.

    Raises:
        RuntimeError: if `run` does something that a CUDA graph cannot contain.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph

"""Recording work of a GPU as a CUDA graph, which the host launches with one call."""

from collections.abc import Callable

import torch

WARM_UPS = 3
"""calls before the recording, in which libraries allocate their workspaces and kernels are compiled"""


def record(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Call `run` a few times, then record another call, which does not execute; `replay()` of the graph executes it.

    Args:
        run: work on the current GPU that reads and writes the same memory on every call. It must not make the host wait
            for the GPU.

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
    with torch.cuda.graph(graph):
        run()
    return graph

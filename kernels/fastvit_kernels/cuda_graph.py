"""Recording work of a GPU as a CUDA graph, which the host launches with one call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

WARM_UPS = 3
"""calls before the recording, in which libraries allocate their workspaces and kernels are compiled"""


def record_graph(
    run: Callable[[], object], pool: Any | None = None, generators: Sequence[torch.Generator] = ()
) -> torch.cuda.CUDAGraph:
    """Call `run` a few times, then record another call, which does not execute; `replay()` of the graph executes it.

    Args:
        run: work on the current GPU that reads and writes the same memory on every call. It must not make the host wait
            for the GPU.
        pool: memory pool of the graph, from `torch.cuda.graph_pool_handle`, by default one of its own. Graphs can share
            a pool if nobody reads their results.
        generators: random generators of the GPU that `run` draws from, in addition to the default one.

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
    for generator in generators if torch.__version__ < "2.14" else ():  # from then on, the graph finds them itself
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph


def side_by_side(parts: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Return a function that calls each of `parts` on a CUDA stream of its own, so that their kernels can overlap.

    They begin after the work on the current stream, and what follows on it begins after them. In a CUDA graph, each
    part is a branch.

    Args:
        parts: work on the current GPU; none may write what another one reads or writes.
    """
    streams = [torch.cuda.Stream() for _ in parts]

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream, part in zip(streams, parts, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part()
        for stream in streams:
            current.wait_stream(stream)

    return run

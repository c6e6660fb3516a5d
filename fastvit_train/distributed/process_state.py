"""What a run changes for the whole process and restores at its end: in a notebook, another one follows."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
import torch


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore the environment and the random states after the context.

    The random states are those of Python, NumPy and PyTorch on the CPU, and on the GPUs if they are in use before.
    """
    environment = dict(os.environ)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


class RandomStates:
    """Random states of PyTorch, on the CPU and the GPUs, for several runs that take turns in this process.

    All start with the state at the beginning. One of them is in use at a time, at first that of run 0, and again after
    the context. On a GPU, CUDA graphs can contain a switch; it does not make the host wait.
    """

    def __init__(self, runs: int) -> None:
        if runs > 1 and torch.cuda.is_available():
            torch.cuda.init()  # creates the generators
        self._gpus = torch.cuda.default_generators if runs > 1 else ()
        self._cpu_states = [torch.get_rng_state() for _ in range(runs)]
        self._gpu_states = [
            [gpu.clone_state() if run else gpu.graphsafe_get_state() for gpu in self._gpus] for run in range(runs)
        ]
        self._in_use = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.switch_to(0)

    def switch_to(self, run: int) -> None:
        """Use the states of the run with this index from now on."""
        if run == self._in_use:
            return
        self._cpu_states[self._in_use] = torch.get_rng_state()
        torch.set_rng_state(self._cpu_states[run])
        for gpu, state in zip(self._gpus, self._gpu_states[run], strict=True):
            gpu.graphsafe_set_state(state)
        self._in_use = run

    def of_gpu(self, device: torch.device) -> list[torch.Generator]:
        """Return generators with the states of all runs on a GPU, for `CUDAGraph.register_generator_state`."""
        return [states[device.index or 0] for states in self._gpu_states if states]

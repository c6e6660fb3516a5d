"""What a program asks of a null CUDA device: a preloaded library that stands in for CUDA, counts, and computes nothing.

Memory, copies and memset are real; where kernels and library calls would write, memory stays as it was.
"""

import ctypes
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch


@dataclass
class Counts:
    """What was asked of the device, counted by name; kernels include cuBLAS, cuDNN and NCCL calls, copies and fills."""

    launched: Counter[str] = field(default_factory=Counter)
    """kernels launched outside graphs"""
    captured: Counter[str] = field(default_factory=Counter)
    """nodes added to graphs"""
    replayed: Counter[str] = field(default_factory=Counter)
    """nodes run by launches of graphs"""
    calls: Counter[str] = field(default_factory=Counter)
    """other calls: cudaGraphLaunch, cudaGraphInstantiate and the synchronisations"""
    violations: int = 0
    """calls that a capture forbids, and launches on a stream of another device"""

    @property
    def synchronisations(self) -> int:
        """Number of calls in which the host waits for the device."""
        return sum(number for name, number in self.calls.items() if "ynchron" in name)


def is_present() -> bool:
    """Whether this process runs on a null CUDA device; asking does not initialise CUDA."""
    return torch.cuda.is_available() and hasattr(ctypes.CDLL(None), "nullcuda_reset")


def wrong_values() -> tuple[type[BaseException], ...]:
    """The exceptions of a test that sees other values than it expects."""
    from torch.testing._internal.optests import OpCheckError  # of torch.library.opcheck, which torch exports without it

    return AssertionError, pytest.fail.Exception, OpCheckError


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what the block asks of the device; the counts are filled in when it ends. Blocks cannot be nested."""
    library = ctypes.CDLL(None)
    library.nullcuda_violations.restype = ctypes.c_long
    counts = Counts()
    library.nullcuda_reset()
    try:
        yield counts
    finally:
        _fill(counts, library)


def _fill(counts: Counts, library: ctypes.CDLL) -> None:
    counts.violations = library.nullcuda_violations()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "counts")
        library.nullcuda_dump(bytes(table))
        for line in table.read_text().splitlines():
            *numbers, name = line.split("\t", 3)
            launched, captured, replayed = map(int, numbers)
            if name.startswith("#"):
                counts.calls[name.removeprefix("#")] += launched
            else:
                counts.launched[name] += launched
                counts.captured[name] += captured
                counts.replayed[name] += replayed


def accept_any_value(patch: pytest.MonkeyPatch) -> None:
    """Let training go on with NaN and inf, and show tensors without their values.

    Torch asks the device how many elements to show, and the answer is whatever lies in memory.
    """
    patch.setattr("fastvit_train.training.checkpointing._check_weights", lambda session: None)
    patch.setattr("fastvit_train.training.epoch_totals.math.isfinite", lambda loss: True)
    patch.setattr(torch.Tensor, "__repr__", lambda tensor, **_: f"<tensor {tuple(tensor.shape)} on {tensor.device}>")

"""One benchmark case: what is timed, how its result is checked, and which cases it is compared with."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.autotune.cache import processor
from fastvit_train.distributed.cpu_threads import use_all_cores
from fastvit_train.utils import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""largest allowed distance from the reference, relative to the reference's norm"""
CALLS = {"cpu": 1, "cuda": 20}
"""calls per timed block; synchronising a GPU after each call would dominate calls of a few microseconds"""
CHECK_BATCH = 4
"""images per call when benchmarks are disabled and a case is only checked"""


def device() -> torch.device:
    """Return the device that everything is timed on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Workload:
    """A function that is ready to be timed, and its check.

    Attributes:
        run: one call; it may return before the device has finished.
        check: raises AssertionError unless `run` computes the right result; it may call `run`.
        images: number of images that one call processes.
        flops: FLOPs of one call by definition, without padding and recomputation; None if counting makes no sense.
        parameters: tensors that do not count as saved for the backward pass; None if the call has no backward pass.
        calls: calls of `run` between two synchronisations of the device.
        rounds: number of timed rounds under pytest-benchmark, without warm-up; by default pytest-benchmark chooses it.
        close: releases processes and other resources.
        extra: returns additional results of this workload; called after the timing.
    """

    run: Callable[[], object]
    check: Callable[[], None]
    images: int
    flops: float | None = None
    parameters: tuple[Tensor, ...] | None = None
    calls: int = 1
    rounds: int | None = None
    close: Callable[[], object] = lambda: None
    extra: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class BenchmarkCase:
    """One case. Cases with the same operation, shape and dtype on one device form a group, which is compared.

    Attributes:
        operation: what is timed, such as "training step".
        shape: its sizes, as text.
        dtype: "fp32" or "bf16", or in words if it mixes them.
        name: the name that distinguishes the case from the others of its group.
        batch: images per call when it is timed.
        build: makes the workload for a number of images per call.
        why_unavailable: why it cannot run here, or None if it can.
        main: whether it belongs to the comparison that bench/README.md opens with, which is timed by default.
        quick_check: whether plain `pytest`, which times nothing, checks it; `pytest -m slow` checks the others.
    """

    operation: str
    shape: str
    dtype: str
    name: str
    batch: int
    build: Callable[[int], Workload]
    why_unavailable: str | None = None
    main: bool = False
    quick_check: bool = False

    @property
    def group(self) -> str:
        return f"{self.operation}, {self.shape}, {self.dtype}, {device_name()}"

    @property
    def id(self) -> str:
        return f"{self.operation}, {self.shape}, {self.dtype}, {self.name}"


def device_name() -> str:
    """Return the name of the device; for a CPU with the instruction set and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor() or platform.processor()} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


def assert_close(result: Tensor, expected: Tensor, dtype: str, name: str) -> None:
    """Raise AssertionError if the relative distance of the tensors exceeds the tolerance of `dtype`."""
    expected = expected.double()
    distance = (result.double().to(expected.device) - expected).norm() / expected.norm().clamp(min=1e-30)
    assert distance <= TOLERANCES[dtype], f"{name}: {distance:.1e} from the reference, allowed {TOLERANCES[dtype]:.0e}"


def prepare_process() -> None:
    """Set the threads and the memory allocator as training on this device does."""
    use_all_cores()
    if device().type == "cpu":
        memory.retain_freed_memory()

"""Measures one row: time, FLOPs, the FLOP/s of a large matrix product, memory and energy."""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.case import DTYPES, Case, Work, device
from bench.environment import environment
from fastvit_train.profiling.roofline import matmul_ceiling
from fastvit_train.utils import memory
from fastvit_train.utils.gpu_monitor import Meter, Usage
from fastvit_train.utils.timing import synchronize, time_call

WARM_UP_SECONDS = 0.3


class Row:
    """A case that was built, called once and checked; call `warm_up` before you time `block`.

    Args:
        case: what to measure.
        batch: images per call; None for the case's own batch.
    """

    def __init__(self, case: Case, batch: int | None = None) -> None:
        self.case = case
        self.work: Work = case.build(batch or case.batch)
        self.first_call_seconds = time_call(self.work.run, device())
        self.work.check()
        self._meter = Meter(device())
        self._blocks = 0

    def warm_up(self) -> None:
        """Run blocks that are not timed."""
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP_SECONDS:
            self.block()

    def block(self) -> None:
        """Run the calls that are timed together, and wait for the device."""
        for _ in range(self.work.calls):
            self.work.run()
        synchronize(device())
        self._blocks += 1

    def metered(self, run: Callable[[], Any]) -> Usage:
        """Measure the GPU's usage during `run`, which calls `block` one or more times."""
        self._blocks = 0
        self._meter.start()
        run()
        return self._meter.stop()

    def facts(self, block_seconds: float, usage: Usage) -> dict[str, Any]:
        """Return the row's other columns: throughput, FLOPs, memory, energy and the environment.

        Args:
            block_seconds: median seconds of a `block`.
            usage: the GPU's usage, as `metered` returned it.
        """
        work, case = self.work, self.case
        seconds = block_seconds / work.calls
        ceiling = matmul_ceiling(DTYPES[case.dtype], device()) if work.flops is not None else None
        images = self._blocks * work.calls * work.images
        return {
            "what": case.what,
            "shape": case.shape,
            "dtype": case.dtype,
            "images_per_call": work.images,
            "calls_per_block": work.calls,
            "images_per_second": work.images / seconds,
            "flops_per_image": None if work.flops is None else work.flops / work.images,
            "matmul_ceiling_flops": ceiling,
            "mfu": None if work.flops is None or ceiling is None else work.flops / seconds / ceiling,
            "first_call_seconds": self.first_call_seconds,
            **memory_of(work),
            "energy_joules_per_image": None if usage.energy_joules is None else usage.energy_joules / images,
            "energy_unmeasured": usage.unmeasured,
            "mean_power_watts": usage.mean_power_watts,
            "gpu_utilization": usage.utilization,
            "sm_clock_mhz": usage.sm_clock_mhz,
            "environment": environment(),
            **work.extra(),
        }


def memory_of(work: Work) -> dict[str, float | None]:
    """Measure the memory of one call in MiB.

    On a GPU this is the peak of CUDA's allocator minus the memory that was allocated before the call; on a CPU, the
    bytes that autograd saves and the process's peak resident memory.
    """
    saved = None
    if device().type == "cpu" and work.parameters is not None:
        saved = memory.saved_for_backward(work.run, work.parameters) / 2**20
    before = torch.cuda.memory_allocated() if device().type == "cuda" else 0
    memory.reset_peak_memory(device())
    work.run()
    synchronize(device())
    peak = memory.peak_mib(device())
    if device().type == "cpu":
        return {"saved_for_backward_mib": saved, "peak_rss_mib": peak}
    return {"peak_memory_mib": None if work.replayed else peak - before / 2**20}


def by_group(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the rows that are compared with each other."""
    groups = dict.fromkeys(row["group"] for row in found)
    return [[row for row in found if row["group"] == group] for group in groups]

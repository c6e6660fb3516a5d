"""Measure one case: time, FLOPs against the matrix product's ceiling, memory and energy."""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.benchmark_case import DTYPES, BenchmarkCase, Workload, device
from bench.environment import environment
from fastvit_train.profiling.roofline import matmul_ceiling
from fastvit_train.utils import memory
from fastvit_train.utils.gpu_monitor import Meter, Usage
from fastvit_train.utils.timing import synchronize, time_call

WARM_UP_SECONDS = 0.3
DEFAULT_POOL = (0, 0)
"""where the allocator keeps the memory of everything but CUDA graphs"""


class PreparedCase:
    """A case whose workload was built, called for the first time and checked, ready to be timed.

    Args:
        case: the case to prepare.
        batch: images per call; by default that of the case.
    """

    def __init__(self, case: BenchmarkCase, batch: int | None = None) -> None:
        self.case = case
        pools_mib = graph_pools_mib()
        self.workload: Workload = case.build(batch or case.batch)
        try:
            self.first_call_seconds = time_call(self.workload.run, device())
            self.workload.check()
        except BaseException:
            self.workload.close()
            raise
        self._graphs_mib = graph_pools_mib() - pools_mib
        self._meter = Meter(device())
        self._blocks = 0

    def warm_up(self) -> None:
        """Run untimed blocks for `WARM_UP_SECONDS`."""
        started = time.perf_counter()
        while time.perf_counter() - started < WARM_UP_SECONDS:
            self.block()

    def block(self) -> None:
        """Run `workload.calls` calls and wait for the device: the block that is timed."""
        for _ in range(self.workload.calls):
            self.workload.run()
        synchronize(device())
        self._blocks += 1

    def meter_usage(self, run: Callable[[], Any]) -> Usage:
        """Measure the GPU usage of `run`, which calls `block`."""
        self._blocks = 0
        self._meter.start()
        run()
        return self._meter.stop()

    def describe(self, block_seconds: float, usage: Usage) -> dict[str, Any]:
        """Return throughput, FLOPs, memory, energy and environment; energy is None, with the reason, if not measured.

        Args:
            block_seconds: median seconds of one `block`.
            usage: GPU usage of the blocks in `meter_usage`.
        """
        workload, case = self.workload, self.case
        seconds = block_seconds / workload.calls
        ceiling = matmul_ceiling(DTYPES[case.dtype], device()) if workload.flops is not None else None
        images = self._blocks * workload.calls * workload.images
        return {
            "operation": case.operation,
            "shape": case.shape,
            "dtype": case.dtype,
            "images_per_call": workload.images,
            "calls_per_block": workload.calls,
            "images_per_second": workload.images / seconds,
            "flops_per_image": None if workload.flops is None else workload.flops / workload.images,
            "matmul_ceiling_flops": ceiling,
            "mfu": None if workload.flops is None or ceiling is None else workload.flops / seconds / ceiling,
            "first_call_seconds": self.first_call_seconds,
            **measure_memory(workload, self._graphs_mib),
            "energy_joules_per_image": None if usage.energy_joules is None else usage.energy_joules / images,
            "energy_unmeasured": usage.energy_unmeasured,
            "mean_power_watts": usage.mean_power_watts,
            "gpu_utilization": usage.utilization,
            "sm_clock_mhz": usage.sm_clock_mhz,
            "environment": environment(),
            **workload.extra(),
        }


def graph_pools_mib() -> float:
    """Return the MiB that CUDA graphs hold: each reserves its memory when it is recorded, in a pool of its own."""
    if device().type != "cuda":
        return 0.0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] != DEFAULT_POOL) / 2**20


def measure_memory(workload: Workload, graphs_mib: float) -> dict[str, float | None]:
    """Measure the memory of one call in MiB.

    On a GPU it is the peak that CUDA reports, less what was allocated before, and `graphs_mib`, the memory that the
    workload's CUDA graphs hold: replaying a graph allocates nothing. On a CPU it is what autograd saves for the
    backward pass, and the peak resident memory of the process.
    """
    saved = None
    if device().type == "cpu" and workload.parameters is not None:
        saved = memory.saved_for_backward(workload.run, workload.parameters) / 2**20
    before = torch.cuda.memory_allocated() if device().type == "cuda" else 0
    memory.reset_peak_memory(device())
    workload.run()
    synchronize(device())
    peak = memory.peak_mib(device())
    if device().type == "cpu":
        return {"saved_for_backward_mib": saved, "peak_rss_mib": peak}
    return {"peak_memory_mib": peak - before / 2**20 + graphs_mib}


def by_group(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split rows into groups of rows that are compared with each other."""
    groups = dict.fromkeys(row["group"] for row in rows)
    return [[row for row in rows if row["group"] == group] for group in groups]

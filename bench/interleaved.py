"""Interleaved measurement: each round times every case once, so that other load on the machine affects all alike."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.benchmark_case import BenchmarkCase, device
from bench.measure import PreparedCase
from fastvit_train.utils.gpu_monitor import MIN_ENERGY_SECONDS
from fastvit_train.utils.timing import quartiles, time_call, time_in_rounds

MIN_ROUNDS, MAX_ROUNDS = 9, 41
"""timed rounds per group"""

Result = dict[str, Any]
Results = list[Result]


def controls() -> dict[str, Callable[[], object]]:
    """Return functions that no commit changes, timed in every round: matrix products, and a layer of torch.nn."""
    factor = 1 if device().type == "cpu" else 8
    matrix = torch.randn(1024 * factor, 1024 * factor, device=device())
    half, tokens = matrix.bfloat16(), torch.randn(64 * factor, 64, 48, device=device(), dtype=torch.bfloat16)
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, device=device(), dtype=torch.bfloat16)
    return {
        "matrix product": lambda: matrix @ matrix,
        "matrix product in bf16": lambda: half @ half,
        "a layer forward and backward in bf16": lambda: layer(tokens).sum().backward(),
    }


def measure(
    groups: dict[str, list[BenchmarkCase]], seconds: float, console: Console
) -> Iterator[tuple[Results, Results, Results]]:
    """Measure the groups; yield each group's rows, those that failed, and the control times of all groups so far.

    A row that cannot be built or fails its check is reported and left out; the others are measured.

    Args:
        groups: cases by group.
        seconds: approximate time to spend on each case; each is timed at least `MIN_ROUNDS` times.
        console: where progress is printed.
    """
    control = controls()
    control_seconds: dict[str, list[float]] = {name: [] for name in control}
    time_in_rounds([*control.values()], 1, device())  # to warm up
    for name, cases in groups.items():
        with ExitStack() as stack:
            rows, failed = [], []
            for case in cases:
                try:
                    with console.status(f"building and checking: {case.id}"):
                        row = PreparedCase(case)
                except Exception as error:
                    failed.append({"id": case.id, "name": case.name, "error": f"{type(error).__name__}: {error}"})
                    console.print(f"failed: {case.id}: {failed[-1]['error']}", markup=False, soft_wrap=True)
                    continue
                stack.callback(row.workload.close)
                rows.append(row)
            console.print(f"{name}: {len(rows)} rows, interleaved")  # the status line would disturb the timing
            results = _measure_group(rows, seconds, control, control_seconds) if rows else []
        yield results, failed, [{"name": name, "seconds": values} for name, values in control_seconds.items()]


def _measure_group(
    rows: list[PreparedCase],
    seconds: float,
    control: dict[str, Callable[[], object]],
    control_seconds: dict[str, list[float]],
) -> Results:
    for row in rows:
        row.warm_up()
    blocks = [row.block for row in rows]
    first_times = [time_call(block) for block in blocks]
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds * len(rows) / sum(first_times))))
    times = time_in_rounds([*control.values(), *blocks], rounds - 1, device())
    for name, values in zip(control, times, strict=False):
        control_seconds[name] += values
    block_times = [[first, *values] for first, values in zip(first_times, times[len(control) :], strict=True)]
    return [_result(row, values, seconds) for row, values in zip(rows, block_times, strict=True)]


def _result(row: PreparedCase, block_seconds: list[float], seconds_metered: float) -> Result:
    _, median, _ = quartiles(block_seconds)

    def work() -> None:
        end = time.perf_counter() + max(seconds_metered, MIN_ENERGY_SECONDS)
        row.block()
        while device().type == "cuda" and time.perf_counter() < end:
            row.block()

    usage = row.meter_usage(work)
    facts = row.describe(median, usage)
    del facts["environment"]  # the same for all rows
    seconds = [value / row.workload.calls for value in block_seconds]
    return {"id": row.case.id, "group": row.case.group, "name": row.case.name, "seconds": seconds, **facts}

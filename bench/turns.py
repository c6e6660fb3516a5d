"""Rows measured in turn: every round times each once, so that what slows the machine slows all of them alike."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.case import Case, device
from bench.measure import Row, quartiles, seconds_of
from fastvit_train.profiling.roofline import synchronize

FEWEST, MOST = 9, 41
"""rounds"""

Result = dict[str, Any]
Results = list[Result]


def controls() -> dict[str, Callable[[], None]]:
    """What no commit changes, timed in every round: matrix products in both dtypes, a layer of torch.nn."""
    factor = 1 if device().type == "cpu" else 8
    matrix = torch.randn(1024 * factor, 1024 * factor, device=device())
    half, tokens = matrix.bfloat16(), torch.randn(64 * factor, 64, 48, device=device(), dtype=torch.bfloat16)
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, device=device(), dtype=torch.bfloat16)

    def waited_for(run: Callable[[], object]) -> Callable[[], None]:
        def work() -> None:
            run()
            synchronize(device())

        return work

    return {
        "matrix product": waited_for(lambda: matrix @ matrix),
        "matrix product in bf16": waited_for(lambda: half @ half),
        "a layer forward and backward in bf16": waited_for(lambda: layer(tokens).sum().backward()),
    }


def measure(groups: dict[str, list[Case]], seconds: float, console: Console) -> Iterator[tuple[Results, Results]]:
    """Each group's rows, measured, and with them the controls of all groups so far.

    Args:
        groups: cases by group.
        seconds: to spend on timing each row, about; no row is timed fewer than `FEWEST` times.
        console: says what is under way.
    """
    control = controls()
    control_seconds: dict[str, list[float]] = {name: [] for name in control}
    for run in control.values():
        run()
    for name, cases in groups.items():
        with ExitStack() as stack:
            rows = []
            for case in cases:
                with console.status(f"building and checking: {case.id}"):
                    row = Row(case)
                stack.callback(row.work.close)
                rows.append(row)
            console.print(f"{name}: {len(rows)} rows in turn")  # nothing moves while the clock runs
            results = _in_turn(rows, seconds, control, control_seconds)
        yield results, [{"name": name, "seconds": values} for name, values in control_seconds.items()]


def _in_turn(
    rows: list[Row], seconds: float, control: dict[str, Callable[[], None]], control_seconds: dict[str, list[float]]
) -> Results:
    for row in rows:
        row.warm_up()
    times = [[seconds_of(row.block)] for row in rows]
    round_seconds = sum(first for (first,) in times)
    rounds = min(MOST, max(FEWEST, math.ceil(seconds * len(rows) / round_seconds)))
    for _ in range(rounds - 1):
        for name, run in control.items():
            control_seconds[name].append(seconds_of(run))
        for row, values in zip(rows, times, strict=True):
            values.append(seconds_of(row.block))
    return [_result(row, values, seconds) for row, values in zip(rows, times, strict=True)]


def _result(row: Row, block_seconds: list[float], seconds_metered: float) -> Result:
    _, median, _ = quartiles(block_seconds)
    blocks = math.ceil(seconds_metered / median) if device().type == "cuda" else 1

    def work() -> None:
        for _ in range(blocks):
            row.block()

    usage = row.metered(work)
    facts = row.facts(median, usage)
    del facts["environment"]  # the same for all rows
    seconds = [value / row.work.calls for value in block_seconds]
    return {"id": row.case.id, "group": row.case.group, "name": row.case.name, "seconds": seconds, **facts}

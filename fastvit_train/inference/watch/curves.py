"""The values of a run's curves, as the page draws them."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fastvit_train.runs.plots.curves import MAX_PLOTTED
from fastvit_train.runs.run_folder import RunFolder, read_jsonl

KEYS = ("step", "train_loss", "test_loss", "test_accuracy")
MAX_STEPS = 400
"""points of the curve by step: more would be less than a pixel apart"""


def read_curves(folder: RunFolder) -> dict[str, list[dict[str, float | None]]]:
    """Return the values of a run's curves: `epochs` from its metrics.jsonl, `steps` from its steps.jsonl.

    A value that is missing or can't be drawn is None. The seconds of an epoch count from the start of the run, without
    evaluation; of many steps, neighbours are averaged.

    Raises:
        OSError: if a file can't be read.
    """
    rows = [row for row in read_jsonl(folder.metrics) if type(row.get("epoch")) is int]
    seconds = accumulate(_number(row, "seconds") or 0.0 for row in rows)
    epochs = [
        {"epoch": _number(row, "epoch"), "seconds": at, **{key: _number(row, key) for key in KEYS}}
        for row, at in zip(rows, seconds, strict=True)
    ]
    return {"epochs": epochs, "steps": _losses(read_jsonl(folder.steps))}


def _losses(rows: Sequence[dict[str, Any]]) -> list[dict[str, float | None]]:
    points = [(_number(row, "step"), _number(row, "loss")) for row in rows]
    drawn = [(step, loss) for step, loss in points if step is not None and loss is not None]
    size = math.ceil(len(drawn) / MAX_STEPS) or 1
    groups = [drawn[first : first + size] for first in range(0, len(drawn), size)]
    return [{"step": group[-1][0], "train_loss": sum(loss for _, loss in group) / len(group)} for group in groups]


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= MAX_PLOTTED else None  # NaN too is not drawn

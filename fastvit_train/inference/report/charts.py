"""Curves by epoch for a page: where each line and tick of an SVG lies, and the values for who doesn't see it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from fastvit_train.inference.report.records import Record
from fastvit_train.inference.report.tables import NOTHING
from fastvit_train.runs.plots import MAX_PLOTTED, PANELS

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 350, 12, 204
"""of the box that lines are drawn in, SVG units, about pixels"""
MOST_EPOCHS = 10**9
FEW = 3
"""epochs, below which points are drawn too"""


@dataclass(frozen=True)
class Line:
    """A run's curve; its style is its place among the runs."""

    name: str
    path: str
    """the d of an SVG path, with a gap where a value is none"""
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A picture of a figure by epoch, a line per run."""

    title: str
    key: str
    """the figure's name in metrics.jsonl"""
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    description: str
    rows: list[tuple[int, list[str]]]
    """an epoch and each run's value"""
    values: str
    """JSON for the script: epochs, their x, and each run's y and value in words"""


def charts(records: Sequence[Record]) -> list[Chart]:
    """Train loss, test loss (both nats) and accuracy by epoch, as far as metrics.jsonl has them."""
    drawn = [_chart(title, key, records) for title, key in PANELS.items()]
    return [chart for chart in drawn if chart is not None]


def _chart(title: str, key: str, records: Sequence[Record]) -> Chart | None:
    scale = 100 if key == "test_accuracy" else 1
    columns = [dict(_values(record.epochs, key)) for record in records]
    epochs = sorted({epoch for column in columns for epoch in column})
    if not epochs:
        return None
    values = [scale * value for column in columns for value in column.values()]
    x_marks = MaxNLocator(nbins=6, integer=True).tick_values(epochs[0], epochs[-1])
    around = 0.0 if min(values) < max(values) else abs(values[0]) / 10 or 1.0
    y_marks = MaxNLocator(nbins=5).tick_values(min(values) - around, max(values) + around)
    x_of = _scale(epochs[0], epochs[-1], LEFT + 6, RIGHT - 6)
    y_of = _scale(y_marks[0], y_marks[-1], BOTTOM, TOP)
    places = [{epoch: y_of(scale * value) for epoch, value in column.items()} for column in columns]
    words = [{epoch: _words(key, value) for epoch, value in column.items()} for column in columns]
    series = [
        {
            "name": record.name,
            "y": [place.get(epoch) for epoch in epochs],
            "said": [word.get(epoch, NOTHING) for epoch in epochs],
        }
        for record, place, word in zip(records, places, words, strict=True)
    ]
    return Chart(
        title,
        key,
        [
            _line(record.name, [(x_of(epoch), place.get(epoch)) for epoch in epochs])
            for record, place in zip(records, places, strict=True)
        ],
        [(x_of(mark), f"{mark:g}") for mark in x_marks if epochs[0] <= mark <= epochs[-1]],
        [(y_of(mark), f"{mark:.4g}") for mark in y_marks],
        _description(title, records, words),
        [(epoch, [word.get(epoch, NOTHING) for word in words]) for epoch in epochs],
        json.dumps({"epochs": epochs, "x": [x_of(epoch) for epoch in epochs], "runs": series}),
    )


def _values(rows: Sequence[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(epoch, value) as far as both are numbers that can be drawn."""
    for row in rows:
        epoch, value = row.get("epoch"), row.get(key)
        if type(epoch) is not int or not isinstance(value, int | float):
            continue
        if 0 <= epoch <= MOST_EPOCHS and abs(value) <= MAX_PLOTTED:
            yield epoch, float(value)


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """From low .. high to start .. end, to a tenth of a pixel; to the middle where low is high."""

    def place(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(float(start + share * (end - start)), 1)

    return place


def _words(key: str, value: float) -> str:
    return f"{value:.2%}" if key == "test_accuracy" else f"{value:.4f}"


def _line(name: str, places: Sequence[tuple[float, float | None]]) -> Line:
    path, pen = [], "M"
    for x, y in places:
        if y is not None:
            path.append(f"{pen}{x:g} {y:g}")
        pen = "M" if y is None else "L"
    points = [(x, y) for x, y in places if y is not None]
    return Line(name, "".join(path), points if len(points) < FEW else [])


def _description(title: str, records: Sequence[Record], words: Sequence[dict[int, str]]) -> str:
    said = []
    for record, word in zip(records, words, strict=True):
        if not word:
            said.append(f"{record.name}: no values")
            continue
        first, last = min(word), max(word)
        said.append(f"{record.name} from {word[first]} in epoch {first} to {word[last]} in epoch {last}")
    return f"Lines of {title} by epoch. {'; '.join(said)}. The table below holds every value."

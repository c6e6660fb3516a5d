"""Charts of a report: coordinates of an SVG's lines and ticks, and the values as text for screen readers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from fastvit_train.inference.report.records import RunRecord
from fastvit_train.runs.comparison import MISSING
from fastvit_train.runs.plots.curves import MAX_PLOTTED

PANELS = {"train loss": "train_loss", "test loss": "test_loss", "accuracy, %": "test_accuracy"}
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 350, 12, 204
"""edges of the plot area, in SVG units (about pixels)"""
MAX_HORIZONTAL_NAMES = 12
"""with more classes, the names above the columns of a confusion matrix are vertical"""
MAX_EPOCHS = 10**9
MIN_EPOCHS_WITHOUT_MARKERS = 3
"""with fewer epochs, each value has a marker"""


@dataclass(frozen=True)
class Line:
    """The curve of a run."""

    name: str
    path: str
    """the `d` attribute of an SVG path; missing values are gaps"""
    markers: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of a metric by epoch, with a line per run."""

    title: str
    key: str
    """the metric's key in metrics.jsonl"""
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    """(coordinate, label)"""
    y_ticks: list[tuple[float, str]]
    description: str
    rows: list[tuple[int, list[str]]]
    """(epoch, value of each run in words)"""
    values: str
    """JSON for report.js: epochs, their x coordinates, and each run's y coordinates and values in words"""


def charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Return charts of train loss, test loss (both in nats) and accuracy, if metrics.jsonl has them."""
    result = [_chart(title, key, records) for title, key in PANELS.items()]
    return [chart for chart in result if chart is not None]


def _chart(title: str, key: str, records: Sequence[RunRecord]) -> Chart | None:
    scale = 100 if key == "test_accuracy" else 1
    columns = [dict(_values(record.epochs, key)) for record in records]
    epochs = sorted({epoch for column in columns for epoch in column})
    if not epochs:
        return None
    values = [scale * value for column in columns for value in column.values()]
    x_ticks = MaxNLocator(nbins=6, integer=True).tick_values(epochs[0], epochs[-1])
    margin = 0.0 if min(values) < max(values) else abs(values[0]) / 10 or 1.0
    y_ticks = MaxNLocator(nbins=5).tick_values(min(values) - margin, max(values) + margin)
    x_of = _scale(epochs[0], epochs[-1], LEFT + 6, RIGHT - 6)
    y_of = _scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    coordinates = [{epoch: y_of(scale * value) for epoch, value in column.items()} for column in columns]
    texts = [{epoch: _format(key, value) for epoch, value in column.items()} for column in columns]
    series = [
        {
            "name": record.name,
            "y": [y.get(epoch) for epoch in epochs],
            "text": [text.get(epoch, MISSING) for epoch in epochs],
        }
        for record, y, text in zip(records, coordinates, texts, strict=True)
    ]
    return Chart(
        title,
        key,
        [
            _line(record.name, [(x_of(epoch), y.get(epoch)) for epoch in epochs])
            for record, y in zip(records, coordinates, strict=True)
        ],
        [(x_of(tick), f"{tick:g}") for tick in x_ticks if epochs[0] <= tick <= epochs[-1]],
        [(y_of(tick), f"{tick:.4g}") for tick in y_ticks],
        _describe(title, records, texts),
        [(epoch, [text.get(epoch, MISSING) for text in texts]) for epoch in epochs],
        json.dumps({"epochs": epochs, "x": [x_of(epoch) for epoch in epochs], "runs": series}),
    )


def _values(rows: Sequence[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """Yield (epoch, value) of the rows whose values can be plotted."""
    for row in rows:
        epoch, value = row.get("epoch"), row.get(key)
        if type(epoch) is not int or not isinstance(value, int | float):
            continue
        if 0 <= epoch <= MAX_EPOCHS and abs(value) <= MAX_PLOTTED:
            yield epoch, float(value)


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """Return a function that maps low .. high to start .. end, rounded to 0.1; if low equals high, to the middle."""

    def scale(value: float) -> float:
        fraction = (value - low) / (high - low) if high > low else 0.5
        return round(float(start + fraction * (end - start)), 1)

    return scale


def _format(key: str, value: float) -> str:
    return f"{value:.2%}" if key == "test_accuracy" else f"{value:.4f}"


def _line(name: str, coordinates: Sequence[tuple[float, float | None]]) -> Line:
    path, command = [], "M"
    for x, y in coordinates:
        if y is not None:
            path.append(f"{command}{x:g} {y:g}")
        command = "M" if y is None else "L"
    markers = [(x, y) for x, y in coordinates if y is not None]
    return Line(name, "".join(path), markers if len(markers) < MIN_EPOCHS_WITHOUT_MARKERS else [])


def _describe(title: str, records: Sequence[RunRecord], texts: Sequence[dict[int, str]]) -> str:
    sentences = []
    for record, values in zip(records, texts, strict=True):
        if not values:
            sentences.append(f"{record.name}: no values")
            continue
        first, last = min(values), max(values)
        sentences.append(f"{record.name}: from {values[first]} in epoch {first} to {values[last]} in epoch {last}")
    return f"Line chart of {title} by epoch. {'; '.join(sentences)}. The table below contains all values."

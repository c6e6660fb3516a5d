"""Learning curves of runs: losses and accuracy by epoch, step or time, as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastvit_train.runs.plots.drawing import add_legend, escape_mathtext, save_figure
from fastvit_train.runs.results import distinct_names
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils.errors import UserError

XAxis = Literal["auto", "epoch", "step", "time"]
MAX_EPOCHS_BY_STEP = 3
"""runs of at most so many epochs are drawn by step: a line through three points shows nothing"""
MAX_PLOTTED = 1e40  # above the maximum of float32; matplotlib cannot draw axes for much larger values
MIN_LABEL_GAP = 0.055
"""smallest distance between two labels at the ends of lines, as a fraction of a panel's height"""
SECONDS = {"s": 1, "min": 60, "h": 3600}
KEYS = ("epoch", "train_loss", "test_loss", "test_accuracy")
X_KEYS = {"epoch": "epoch", "step": "step", "time": "seconds"}
"""the values of metrics.jsonl that each x axis is made of"""


@dataclass(frozen=True)
class Curve:
    """A line of a panel."""

    x: Sequence[float]
    y: Sequence[float]

    def end(self) -> tuple[float, float] | None:
        """Return the last point; None if it cannot be drawn."""
        return (self.x[-1], self.y[-1]) if math.isfinite(self.y[-1]) else None


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run."""

    name: str
    epochs: Sequence[float]
    train_loss: Curve
    """nats; by step the loss of each step, otherwise the mean of each epoch"""
    test_loss: Curve
    """nats, after each epoch"""
    accuracy: Curve
    """percent, after each epoch"""

    def best(self) -> int:
        """Return the index of the epoch with the highest accuracy, the first if there are several."""
        return max(range(len(self.epochs)), key=lambda i: (math.isfinite(self.accuracy.y[i]), self.accuracy.y[i]))


def plot_curves(runs: Sequence[Path], output: Path, title: str, x_axis: XAxis = "auto") -> None:
    """Plot train and test loss (nats) in one panel and the accuracy in another, a color per run, as a PNG.

    The epoch with the highest accuracy is marked, and the last value stands at the end of each line.

    Args:
        runs: folders of runs with at least one epoch.
        output: the file to write.
        title: a line above the panels.
        x_axis: what the x axis shows; time is the training time without evaluation. "auto" takes the step for runs of
            up to three epochs, and otherwise the epoch.

    Raises:
        UserError: if a run has no metrics, or if the figure cannot be written.
    """
    if x_axis == "auto":
        most = max(len(read_jsonl(RunFolder(run).metrics)) for run in runs)
        x_axis = "step" if most <= MAX_EPOCHS_BY_STEP else "epoch"
    curves = [_read_curves(run, name, x_axis) for run, name in zip(runs, distinct_names(runs), strict=True)]
    x_name: str = x_axis
    if x_axis == "time":
        unit, curves = _in_large_units(curves)
        x_name = f"training time, {unit}"
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2, sharex=True)
    colors = [f"C{number % 10}" for number in range(len(curves))]
    handles = [_draw_run(loss, accuracy, run, color) for run, color in zip(curves, colors, strict=True)]
    _label_ends(loss, [run.train_loss for run in curves] + [run.test_loss for run in curves], 2 * colors, "{:.3f}")
    _label_ends(accuracy, [run.accuracy for run in curves], colors, "{:.1f}")
    for axes, what in ((loss, "loss, nats"), (accuracy, "accuracy, %")):
        axes.set(title=what, xlabel=x_name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=x_axis != "time", steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    styles: list[dict[str, Any]] = [{"linestyle": ":", "color": "gray"}, {"color": "gray"}, _best_marker("gray")]
    add_legend(loss, [Line2D([], [], **style) for style in styles], ["train", "test", "most accurate epoch"])
    add_legend(accuracy, handles, [_describe_best(run) for run in curves])
    figure.suptitle(escape_mathtext(title), wrap=True)
    save_figure(figure, output)


def _draw_run(loss: Axes, accuracy: Axes, run: RunCurves, color: str) -> Line2D:
    """Draw the curves of a run; returns the line of its accuracy."""
    _draw_line(loss, run.train_loss, color, linestyle=":", alpha=0.8)
    _draw_line(loss, run.test_loss, color)
    line = _draw_line(accuracy, run.accuracy, color)
    for axes, curve in ((loss, run.test_loss), (accuracy, run.accuracy)):
        axes.plot(curve.x[run.best()], curve.y[run.best()], **_best_marker(color))
    return line


def _best_marker(color: str) -> dict[str, Any]:
    return {"marker": "o", "linestyle": "", "color": color, "markerfacecolor": "white", "markersize": 7, "zorder": 3}


def _describe_best(run: RunCurves) -> str:
    best = run.best()
    return f"{run.name}: best {run.accuracy.y[best]:.2f}% in epoch {run.epochs[best]:g}"


def _draw_line(axes: Axes, curve: Curve, color: str, **style: Any) -> Line2D:
    marker = "." if len(curve.x) < 3 else ""
    (line,) = axes.plot(curve.x, curve.y, color=color, marker=marker, **style)
    return line


def _label_ends(axes: Axes, curves: Sequence[Curve], colors: Sequence[str], form: str) -> None:
    """Write the last value next to the end of each line; labels at one place are moved apart vertically."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = [(*end, color) for curve, color in zip(curves, colors, strict=True) if (end := curve.end()) is not None]
    previous = (math.nan, -math.inf)
    for x, y, color in sorted(ends):
        height = (y - low) / (high - low)
        if x == previous[0]:
            height = max(height, previous[1] + MIN_LABEL_GAP)
        axes.annotate(
            form.format(y), (x, height), (7, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            color=color, fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip
        previous = (x, height)


def _in_large_units(runs: Sequence[RunCurves]) -> tuple[str, list[RunCurves]]:
    """Convert curves over seconds to minutes or hours if they are long; returns the unit too."""
    last = max(run.test_loss.x[-1] for run in runs)
    unit = next((unit for unit in ("h", "min") if last >= 2 * SECONDS[unit]), "s")

    def convert(curve: Curve) -> Curve:
        return replace(curve, x=[seconds / SECONDS[unit] for seconds in curve.x])

    return unit, [
        replace(
            run,
            train_loss=convert(run.train_loss),
            test_loss=convert(run.test_loss),
            accuracy=convert(run.accuracy),
        )
        for run in runs
    ]


def _read_curves(run: Path, name: str, x_axis: XAxis) -> RunCurves:
    """Read a run's curves from its metrics.jsonl and, by step, from its steps.jsonl."""
    folder = RunFolder(run)
    try:
        rows = _columns(read_jsonl(folder.metrics), (*KEYS, X_KEYS[x_axis]))
        values = rows[X_KEYS[x_axis]]
        x = list(accumulate(values)) if x_axis == "time" else values
        train = Curve(x, rows["train_loss"])
        if x_axis == "step" and (steps := read_jsonl(folder.steps)):
            by_step = _columns(steps, ("step", "loss"))
            train = Curve(by_step["step"], by_step["loss"])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{run} has no metrics.jsonl that can be plotted ({error!r}); give the folder of a run"
        ) from None
    accuracy = [100 * value for value in rows["test_accuracy"]]
    return RunCurves(name, rows["epoch"], train, Curve(x, rows["test_loss"]), Curve(x, accuracy))


def _columns(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[float]]:
    """Return the values with these names: by name, a list with a value per row.

    Raises:
        LookupError, TypeError, ValueError, OverflowError: if a value is missing, or if it cannot be plotted.
    """
    if not rows:
        raise ValueError("it has no epochs")
    columns = {key: [float(row[key]) for row in rows] for key in keys}
    if any(MAX_PLOTTED < abs(value) < math.inf for values in columns.values() for value in values):
        raise ValueError(f"a value is above {MAX_PLOTTED:g}")
    return columns

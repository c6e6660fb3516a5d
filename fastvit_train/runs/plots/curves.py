"""Learning curves of runs."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastvit_train.runs.plots.drawing import escape_mathtext, save_figure
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils.errors import UserError

PANELS = {"train loss": "train_loss", "test loss": "test_loss", "accuracy, %": "test_accuracy"}
MAX_PLOTTED = 1e40  # above the maximum of float32; matplotlib cannot draw axes for much larger values


def plot_curves(runs: list[Path], output: Path, title: str) -> None:
    """Plot train loss, test loss (both in nats) and accuracy by epoch, a line per run, as a PNG.

    Raises:
        UserError: if a run has no metrics, or if the figure cannot be written.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    for run in runs:
        columns = _read_columns(run)
        epochs = columns["epoch"]
        for axes, key in zip(panels, PANELS.values(), strict=True):
            scale = 100 if key == "test_accuracy" else 1
            axes.plot(
                epochs,
                [scale * value for value in columns[key]],
                label=escape_mathtext(run.resolve().name),
                marker="." if len(epochs) < 3 else "",
            )
    for axes, name in zip(panels, PANELS, strict=True):
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False)
    figure.suptitle(escape_mathtext(title), wrap=True)
    save_figure(figure, output)


def _read_columns(run: Path) -> dict[str, list[float]]:
    """Read the values to plot from the run's metrics.jsonl: by name, a list with a value per epoch."""
    rows = read_jsonl(RunFolder(run).metrics)
    try:
        if not rows:
            raise ValueError("it has no epochs")
        columns = {key: [float(row[key]) for row in rows] for key in ("epoch", *PANELS.values())}
        if any(MAX_PLOTTED < abs(value) < math.inf for values in columns.values() for value in values):
            raise ValueError(f"a value is above {MAX_PLOTTED:g}")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{run} has no metrics.jsonl that can be plotted ({error!r}); give the folder of a run"
        ) from None
    return columns

"""Pictures of runs."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastvit_train.runs.run_folder import RunFolder, read_rows
from fastvit_train.utils.errors import UserError, printable

PANELS = {"train loss": "train_loss", "test loss": "test_loss", "accuracy, %": "test_accuracy"}
MOST_NAMED = 30
"""classes, for their names and numbers to be legible"""
LARGEST_DRAWN = 1e40  # more than a float32, less than what axes can't be drawn for


def plot_curves(runs: list[Path], output: Path, title: str) -> None:
    """Train loss, test loss (both nats) and accuracy by epoch, a line per run, as a PNG.

    Raises:
        UserError: where a run has no metrics, or the picture can't be written.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    for run in runs:
        columns = _columns(run)
        epochs = columns["epoch"]
        for axes, key in zip(panels, PANELS.values(), strict=True):
            scale = 100 if key == "test_accuracy" else 1
            axes.plot(
                epochs,
                [scale * value for value in columns[key]],
                label=literal(run.resolve().name),
                marker="." if len(epochs) < 3 else "",
            )
    for axes, name in zip(panels, PANELS, strict=True):
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False)
    figure.suptitle(literal(title))
    save(figure, output)


def plot_scaling(curves: dict[str, dict[str, list[tuple[int, float, float]]]], output: Path) -> None:
    """Memory of a process (MiB) and images/s of all against their number, a line per model and way, as a PNG.

    Args:
        curves: of each model and way of training it, (processes, MiB, images/s).

    Raises:
        UserError: where the picture can't be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for number, (model, ways) in enumerate(curves.items()):
        for style, (way, points) in zip(("-", "--"), ways.items(), strict=False):
            processes, *figures = zip(*points, strict=True)
            for axes, values in zip(panels, figures, strict=True):
                axes.plot(processes, values, style, color=f"C{number}", marker=".", label=literal(f"{model}, {way}"))
    for axes, name in zip(panels, ("memory of a process, MiB", "images/s of all, estimated"), strict=True):
        axes.set(title=name, xlabel="processes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize="small")
    save(figure, output)


def plot_confusion(confusion: Tensor, classes: Sequence[str], title: str, output: Path) -> None:
    """The confusion matrix, rows true and columns predicted, each row's colours by its share of it, as a PNG.

    Args:
        confusion: whole numbers, (classes, classes).

    Raises:
        UserError: where the picture can't be written.
    """
    count = len(confusion)
    side = min(3 + 0.45 * count, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(title=literal(title), xlabel="predicted", ylabel="true")
    if count <= MOST_NAMED:
        names = [literal(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, values in enumerate(confusion.tolist()):
            for column, value in enumerate(values):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{value:,}", ha="center", va="center", color=color, fontsize=8)
    save(figure, output)


def plot_images(images: Tensor, captions: Sequence[str], output: Path) -> None:
    """Images, uint8 (images, 3, height, width), six in a row, each under its caption, as a PNG.

    Raises:
        UserError: where the picture can't be written.
    """
    columns = min(6, len(captions))
    rows = -(-len(captions) // 6)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels:
        axes.axis("off")
    for axes, image, caption in zip(panels, images, captions, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(_literal_lines(caption), fontsize=8)
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    """Write the figure as a PNG; UserError where that fails."""
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"can't write the picture {output} ({error}); give another --output, such as curves.png"
        ) from None


def _columns(run: Path) -> dict[str, list[float]]:
    """What is drawn of the run's metrics.jsonl: a value per epoch by name."""
    rows = read_rows(RunFolder(run).metrics)
    try:
        if not rows:
            raise ValueError("no epoch is in it")
        columns = {key: [float(row[key]) for row in rows] for key in ("epoch", *PANELS.values())}
        if any(LARGEST_DRAWN < abs(value) < math.inf for values in columns.values() for value in values):
            raise ValueError(f"a value is above {LARGEST_DRAWN:g}")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{run} has no metrics.jsonl to draw ({error!r}); give the folder of a run") from None
    return columns


def _literal_lines(text: str) -> str:
    return "\n".join(map(literal, text.split("\n")))


def literal(text: str) -> str:
    """`text` as matplotlib shows it unchanged: a dollar begins no formula."""
    return printable(text).replace("$", r"\$")

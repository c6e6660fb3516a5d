"""Confusion matrices, images with captions, and plans, written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from fastvit_train.runs.plots.drawing import add_legend, escape_mathtext, in_color, save_figure

MAX_LABELED_CLASSES = 30
"""with more classes, names and counts in a confusion matrix are not legible"""
MAX_NAME_LENGTH = 24
"""characters of a class or a file that fit above an image or next to a confusion matrix"""


def plot_scaling(curves: dict[str, dict[str, list[tuple[int, float, float]]]], output: Path) -> None:
    """Plot memory per process (MiB) and total images/s against the number of processes, as a PNG.

    Args:
        curves: by model and by way of parallelizing it, a list of (processes, MiB, images/s).

    Raises:
        UserError: if the figure cannot be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    names, handles = [], []
    for number, (model, ways) in enumerate(curves.items()):
        for style, (way, points) in zip(("-", "--"), ways.items(), strict=False):
            processes, *figures = zip(*points, strict=True)
            for axes, values in zip(panels, figures, strict=True):
                (line,) = axes.plot(processes, values, style, color=f"C{number}", marker=".")
            names.append(f"{model}, {way}")
            handles.append(line)
    for axes, name in zip(panels, ("memory per process, MiB", "total images/s, estimated"), strict=True):
        axes.set(title=name, xlabel="processes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    add_legend(panels[-1], handles, names, fontsize="small")
    save_figure(figure, output)


def plot_confusion(confusion: Tensor, classes: Sequence[str], title: str, output: Path) -> None:
    """Plot the confusion matrix as a PNG; rows are true classes, columns predicted classes, colors shares of the row.

    Args:
        confusion: number of images, int64 (classes, classes).

    Raises:
        UserError: if the figure cannot be written.
    """
    count = len(confusion)
    side = min(3 + 0.45 * count, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    figure.suptitle(escape_mathtext(title), wrap=True)
    axes.set(xlabel="predicted", ylabel="true")
    if count <= MAX_LABELED_CLASSES:
        names = [_shorten(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, values in enumerate(confusion.tolist()):
            for column, value in enumerate(values):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{value:,}", ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, output)


def plot_roc(false: Tensor, true: Tensor, precision: Tensor, title: str, output: Path) -> None:
    """Plot the ROC curve, and precision against recall, as a PNG.

    Args:
        false, true, precision: false positive rate, true positive rate (recall) and precision of each threshold.
        title: the positive class and its area under the curve.
        output: the PNG file.

    Raises:
        UserError: if the figure cannot be written.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    roc, recall = figure.subplots(1, 2)
    roc.plot([0, *false.tolist()], [0, *true.tolist()], color="C0")
    roc.plot([0, 1], [0, 1], ":", color="gray")
    roc.set(title=f"ROC, {_shorten(title)}", xlabel="false positive rate", ylabel="true positive rate")
    recall.step(true.tolist(), precision.tolist(), where="pre", color="C1")
    recall.set(title="precision and recall", xlabel="recall", ylabel="precision")
    for axes in (roc, recall):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    save_figure(figure, output)


def plot_images(images: Tensor, captions: Sequence[str], output: Path) -> None:
    """Plot images, uint8 (images, 1 or 3, height, width), with their captions, six in a row, as a PNG.

    Raises:
        UserError: if the figure cannot be written.
    """
    columns = min(6, len(captions))
    rows = -(-len(captions) // 6)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
        axes.set_anchor("N")  # or the layout takes the space above an image that is narrower than its place for free
    for axes, image, caption in zip(panels, images, captions, strict=False):
        axes.imshow(in_color(image).permute(1, 2, 0).numpy())
        axes.set_title("\n".join(map(_shorten, caption.split("\n"))), fontsize=8)
    save_figure(figure, output)


def _shorten(name: str) -> str:
    """Return a line of text for matplotlib, without the middle if it is long: many names differ at their end only."""
    half = MAX_NAME_LENGTH // 2
    return escape_mathtext(name if len(name) <= MAX_NAME_LENGTH else f"{name[:half]}…{name[-half:]}")

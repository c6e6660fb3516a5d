"""Pictures of what a trained model looks at and of what it has learned: the verb `inspect`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastvit_train.data.image_paths import expand_paths
from fastvit_train.data.images import decode
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.models import AttentionMaps, attention_maps, patch_filters, position_similarity
from fastvit_train.runs.plots import literal, save
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, printable

MOST_GIVEN = 32
OF_EACH_SET, CLOSER = 10, 4
"""images of the test set that are shown, and how many of them layer by layer"""
MOST_HEADS, MOST_FILTERS = 16, 100
OPACITY = 0.65
"""of weights over an image"""


@dataclass(frozen=True)
class Shown:
    """Images to look at the model's looks by."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    pixels: Tensor
    """uint8 (images, 3, size, size)"""


def inspect_run(run: str, images: Sequence[str], output: Path | None, data_dir: str | None = None) -> list[Path]:
    """Write pictures of the model that `run` names; returns where they are.

    looks.png: each image, what the classifier reads of it (the class token's attention or the pooling weights), and
    that followed through all layers (rollout); NAME-attention.png: the same per layer and head; positions.png: how
    alike the learned positions are; filters.png: the first layer's filters.

    Args:
        run: as in `load_run`.
        images: as in `predict_images`, up to 32; by default some of the test set, one of each class.
        output: folder for the pictures; by default inspect/ in the run's folder.
        data_dir: where the test set lies, if no longer where the run found it.

    Raises:
        UserError: where the model, an image or the data isn't to be had, or the model's attention can't be looked at.
    """
    loaded = load_run(run)
    shown = _given(images, loaded.image_size) if images else _of_the_test_set(loaded, data_dir)
    looks = attention_maps(loaded.model, loaded.preprocess(shown.pixels))
    folder = output or (loaded.folder or Path()) / "inspect"
    with atomic_io.as_save_error(f"{folder} can't be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    return _draw(loaded, shown, looks, folder, closer=len(shown.names) if images else CLOSER)


def _given(images: Sequence[str], image_size: int) -> Shown:
    with expand_paths(images, "inspect") as files:
        if len(files) > MOST_GIVEN:
            raise UserError(f"inspect draws up to {MOST_GIVEN} images, got {len(files):,}; name fewer")
        pixels = torch.stack([decode(path, image_size) for _, path in files])
    names = tuple(printable(Path(name).stem) for name, _ in files)
    if len(set(names)) < len(names):
        names = tuple(f"{number}-{name}" for number, name in enumerate(names, start=1))
    return Shown(names, names, pixels)


def _of_the_test_set(loaded: TrainedModel, data_dir: str | None) -> Shown:
    """The first image of each class, of the first ten."""
    try:
        dataset = loaded.dataset(data_dir)
    except UserError as error:
        raise UserError(f"{error}; name images to look at, as in: inspect {loaded.source} cat.png") from None
    labels = dataset.test.labels
    firsts = dataset.test.first_of_each_class(OF_EACH_SET)
    names = tuple(f"{dataset.evaluated_on}{sample}" for sample in firsts.tolist())
    captions = tuple(dataset.classes[label] for label in labels[firsts].tolist())
    return Shown(names, captions, dataset.test.pixels(firsts, loaded.image_size))


def _draw(loaded: TrainedModel, shown: Shown, looks: AttentionMaps, folder: Path, closer: int) -> list[Path]:
    written = [_draw_looks(loaded, shown, looks, folder / "looks.png")]
    for number in range(min(closer, len(shown.names))):
        path = folder / f"{shown.names[number]}-attention.png"
        written.append(_draw_heads(shown, looks, number, path))
    similarity, filters = position_similarity(loaded.model), patch_filters(loaded.model)
    if similarity is not None:
        written.append(_draw_positions(similarity, folder / "positions.png"))
    if filters is not None:
        written.append(_draw_filters(filters, folder / "filters.png"))
    return written


def _draw_looks(loaded: TrainedModel, shown: Shown, looks: AttentionMaps, path: Path) -> Path:
    """A column per image: itself under its name, what is read of it over the prediction, the rollout."""
    probabilities, classes = loaded.predict(shown.pixels).cpu().max(1)
    count = len(shown.names)
    figure, panels = _panels(3, count, "")
    for number, (probability, label) in enumerate(zip(probabilities.tolist(), classes.tolist(), strict=True)):
        image, pooled, rollout = panels[:, number]
        _show(image, shown.pixels[number])
        image.set_title(literal(shown.captions[number]), fontsize=9)
        _show(pooled, shown.pixels[number], looks.pooled[number])
        pooled.set_title(literal(f"{loaded.classes[label]} {probability:.0%}"), fontsize=9)
        _show(rollout, shown.pixels[number], looks.rollout[number])
    for axes, what in zip(panels[:, 0], ("image", looks.pooling, "rollout"), strict=True):
        axes.set_ylabel(what.replace("'s ", "'s\n"), fontsize=8)
    save(figure, path)
    return path


def _draw_heads(shown: Shown, looks: AttentionMaps, number: int, path: Path) -> Path:
    """A row per layer, a column per head: what the class token, or else the patches on average, attend to."""
    layers = [looks.layer_maps(layer)[number, :MOST_HEADS] for layer in range(len(looks.attention))]
    figure, panels = _panels(
        len(layers),
        1 + len(layers[0]),
        f"{shown.captions[number]}: attention by layer and head, each from 0 to its largest",
    )
    for layer, maps in enumerate(layers):
        _show(panels[layer, 0], shown.pixels[number])
        panels[layer, 0].set_ylabel(f"layer {layer + 1}", fontsize=8)
        for head, weights in enumerate(maps):
            _show(panels[layer, 1 + head], shown.pixels[number], weights)
            if layer == 0:
                panels[0, 1 + head].set_title(f"head {head + 1}", fontsize=8)
    save(figure, path)
    return path


def _draw_positions(similarity: Tensor, path: Path) -> Path:
    """For each patch, in its place, how alike its position is to all others: cosine from -1 (blue) to 1 (red)."""
    rows, columns = similarity.shape[:2]
    figure, panels = _panels(rows, columns, "similarity of each position with all, -1 (blue) to 1 (red)", side=0.7)
    for row in range(rows):
        for column in range(columns):
            panels[row, column].imshow(similarity[row, column].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    save(figure, path)
    return path


def _draw_filters(filters: Tensor, path: Path) -> Path:
    """The first layer's filters, strongest first, grey where they do nothing."""
    filters = filters[:MOST_FILTERS]
    columns = min(12, len(filters))
    figure, panels = _panels(
        -(-len(filters) // columns), columns, "the first layer's filters, strongest first", side=0.7
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, weights in zip(panels.flat, filters, strict=False):
        axes.imshow((weights / (2 * weights.abs().max().clamp(min=1e-12)) + 0.5).permute(1, 2, 0).numpy())
    save(figure, path)
    return path


def _panels(rows: int, columns: int, title: str, side: float = 1.3) -> tuple[Figure, Any]:
    """A figure with a grid of panels without ticks, each `side` inches."""
    figure = Figure(figsize=(side * columns + 0.6, side * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    figure.suptitle(literal(title), fontsize=10)
    return figure, panels


def _show(axes: Axes, pixels: Tensor, weights: Tensor | None = None) -> None:
    """An image, uint8 (3, height, width), and over it weights (rows, columns), light where they are large."""
    height, width = pixels.shape[1:]
    image = pixels.permute(1, 2, 0).numpy()
    if weights is None:
        axes.imshow(image)
        return
    axes.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(
        weights.numpy(), cmap="inferno", alpha=OPACITY, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0,
        interpolation="bilinear",
    )  # fmt: skip

"""Draw a trained model's attention maps, position embeddings and patch filters: the verb `inspect`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastvit_train.data.decode import ImageFiles, count_transparent, decode_all, describe_transparency
from fastvit_train.data.sources.image_paths import expand_paths
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.models import AttentionMaps, attention_maps, patch_filters, position_similarity
from fastvit_train.runs.plots.drawing import escape_mathtext, in_color, save_figure
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, printable

log = logging.getLogger(__name__)
MAX_IMAGES = 32
TEST_IMAGES, TEST_IMAGES_BY_HEAD = 10, 4
"""test images that are drawn by default, and how many of them also by layer and head"""
MAX_HEADS, MAX_FILTERS = 16, 100
OPACITY = 0.65
"""opacity of a heat map over an image"""


@dataclass(frozen=True)
class InspectedImages:
    """The images whose attention maps are drawn."""

    names: tuple[str, ...]
    """names of the files that are written"""
    captions: tuple[str, ...]
    pixels: Tensor
    """uint8 (images, channels, height, width)"""


def inspect_run(
    run: str,
    images: Sequence[str],
    output: Path | None,
    data_dir: str | None = None,
    checkpoint: str | None = None,
) -> list[Path]:
    """Draw a trained model's attention maps, position embeddings and patch filters; returns the files' paths.

    attention-maps.png: each image with the last layer's attention map (the class token's attention or the pooling
    weights) and with the attention rollout through all layers; NAME-attention.png: the attention of one image by layer
    and head; positions.png: the similarity of the position embeddings; filters.png: the first layer's filters.

    Args:
        run: as in `load_run`.
        images: as in `predict_images`, up to 32; by default the first test image of each of the first ten classes.
        output: folder for the figures; by default inspect/ in the run's folder.
        data_dir: the folder that holds the data; by default the folder that the run used.
        checkpoint: as in `load_run`.

    Raises:
        UserError: if the model, an image or the data set is not available, or if the model has no attention maps.
    """
    loaded = load_run(run, checkpoint=checkpoint)
    loaded.print_checkpoint()
    inspected = _read_images(images, loaded) if images else _select_test_images(loaded, data_dir)
    maps = attention_maps(loaded.model, loaded.preprocess(inspected.pixels))
    folder = output or loaded.output_folder("inspect")
    with atomic_io.as_save_error(f"{folder} cannot be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    return _draw(loaded, inspected, maps, folder, by_head=len(inspected.names) if images else TEST_IMAGES_BY_HEAD)


def _read_images(images: Sequence[str], loaded: TrainedModel) -> InspectedImages:
    with expand_paths(images, "inspect") as files:
        if len(files) > MAX_IMAGES:
            raise UserError(f"inspect draws up to {MAX_IMAGES} images, got {len(files):,}; give fewer")
        chosen = ImageFiles([path for _, path in files], loaded.rendering)
        pixels = decode_all(chosen, loaded.input_size)
        if line := describe_transparency(count_transparent(chosen.paths), chosen.rendering.background):
            log.warning("%s", line)
    names = tuple(printable(Path(name).stem) for name, _ in files)
    if len({name.casefold() for name in names}) < len(names):  # some disks ignore the case of a file's name
        names = tuple(f"{number}-{name}" for number, name in enumerate(names, start=1))
    return InspectedImages(names, names, pixels)


def _select_test_images(loaded: TrainedModel, data_dir: str | None) -> InspectedImages:
    """Select the first test image of each of the first ten classes."""
    try:
        dataset = loaded.dataset(data_dir)
    except UserError as error:
        raise UserError(f"{error}; name the images to draw, as in: inspect {loaded.source} cat.png") from None
    labels = dataset.test.labels
    firsts = dataset.test.first_of_each_class(TEST_IMAGES)
    names = tuple(f"{dataset.evaluated_on}{sample}" for sample in firsts.tolist())
    captions = tuple(dataset.classes[label] for label in labels[firsts].tolist())
    return InspectedImages(names, captions, dataset.test.pixels(firsts, loaded.input_size))


def _draw(loaded: TrainedModel, images: InspectedImages, maps: AttentionMaps, folder: Path, by_head: int) -> list[Path]:
    written = [_draw_maps(loaded, images, maps, folder / "attention-maps.png")]
    for number in range(min(by_head, len(images.names))):
        path = folder / f"{images.names[number]}-attention.png"
        written.append(_draw_heads(images, maps, number, path))
    similarity, filters = position_similarity(loaded.model), patch_filters(loaded.model)
    if similarity is not None:
        written.append(_draw_positions(similarity, folder / "positions.png"))
    if filters is not None:
        written.append(_draw_filters(filters, folder / "filters.png"))
    return written


def _draw_maps(loaded: TrainedModel, images: InspectedImages, maps: AttentionMaps, path: Path) -> Path:
    """Draw a column per image: the image, its attention map under the predicted class, and its rollout."""
    probabilities, classes = loaded.predict(images.pixels).cpu().max(1)
    count = len(images.names)
    figure, panels = _create_panels(3, count, "")
    for number, (probability, label) in enumerate(zip(probabilities.tolist(), classes.tolist(), strict=True)):
        image, pooled, rollout = panels[:, number]
        _show_image(image, images.pixels[number])
        image.set_title(escape_mathtext(images.captions[number]), fontsize=9)
        _show_image(pooled, images.pixels[number], maps.pooled[number])
        pooled.set_title(escape_mathtext(f"{loaded.classes[label]} {probability:.0%}"), fontsize=9)
        _show_image(rollout, images.pixels[number], maps.rollout[number])
    for axes, label in zip(panels[:, 0], ("image", maps.pooling, "rollout"), strict=True):
        axes.set_ylabel(label.replace("'s ", "'s\n"), fontsize=8)
    save_figure(figure, path)
    return path


def _draw_heads(images: InspectedImages, maps: AttentionMaps, number: int, path: Path) -> Path:
    """Draw a row per layer and a column per head: the attention of the class token, or the mean over the patches."""
    layers = [maps.layer_maps(layer)[number, :MAX_HEADS] for layer in range(len(maps.attention))]
    figure, panels = _create_panels(
        len(layers),
        1 + len(layers[0]),
        f"{images.captions[number]}: attention by layer and head; each map is scaled to its own maximum",
    )
    for layer, heads in enumerate(layers):
        _show_image(panels[layer, 0], images.pixels[number])
        panels[layer, 0].set_ylabel(f"layer {layer + 1}", fontsize=8)
        for head, weights in enumerate(heads):
            _show_image(panels[layer, 1 + head], images.pixels[number], weights)
            if layer == 0:
                panels[0, 1 + head].set_title(f"head {head + 1}", fontsize=8)
    save_figure(figure, path)
    return path


def _draw_positions(similarity: Tensor, path: Path) -> Path:
    """Draw, at the place of each patch, the cosine similarity of its position embedding with all others."""
    rows, columns = similarity.shape[:2]
    title = "cosine similarity of the position embeddings, from -1 (blue) to 1 (red)"
    figure, panels = _create_panels(rows, columns, title, side=0.7)
    for row in range(rows):
        for column in range(columns):
            panels[row, column].imshow(similarity[row, column].numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    save_figure(figure, path)
    return path


def _draw_filters(filters: Tensor, path: Path) -> Path:
    """Draw the first layer's filters in descending order of their norms; a weight of 0 is gray."""
    filters = filters[:MAX_FILTERS]
    columns = min(12, len(filters))
    figure, panels = _create_panels(
        -(-len(filters) // columns), columns, "the first layer's filters, by descending norm", side=0.7
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, weights in zip(panels.flat, filters, strict=False):
        shades = weights / (2 * weights.abs().max().clamp(min=1e-12)) + 0.5
        axes.imshow(in_color(shades).permute(1, 2, 0).numpy())
    save_figure(figure, path)
    return path


def _create_panels(rows: int, columns: int, title: str, side: float = 1.3) -> tuple[Figure, Any]:
    """Create a figure with a grid of panels without ticks; `side` is that of a panel in inches."""
    figure = Figure(figsize=(side * columns + 0.6, side * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    figure.suptitle(escape_mathtext(title), fontsize=10, wrap=True)
    return figure, panels


def _show_image(axes: Axes, pixels: Tensor, weights: Tensor | None = None) -> None:
    """Show an image, uint8 (channels, height, width), and over it a heat map (rows, columns), bright where large."""
    height, width = pixels.shape[1:]
    image = in_color(pixels).permute(1, 2, 0).numpy()
    if weights is None:
        axes.imshow(image)
        return
    axes.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(
        weights.numpy(), cmap="inferno", alpha=OPACITY, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0,
        interpolation="bilinear",
    )  # fmt: skip

"""Images of a report: the model's most confident mistakes, and its attention maps."""

import base64
from dataclasses import dataclass
from io import BytesIO

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from fastvit_train.inference.evaluate import EvaluatedRun
from fastvit_train.inference.inspect import OPACITY
from fastvit_train.models import attention_maps
from fastvit_train.runs.plots.drawing import in_color

MAX_MISTAKES = 12
MAX_ATTENTION_IMAGES = 6
MIN_SIDE = 128
"""pixels; smaller images are enlarged to about this"""


@dataclass(frozen=True)
class Mistake:
    """A misclassified image."""

    image: str
    """a data: URI of a PNG, as all images in this module"""
    true: str
    predicted: str
    confidence: str


@dataclass(frozen=True)
class HeatMap:
    """Weights of an image's patches, drawn over the image."""

    image: str
    maximum: str
    """the largest weight and its patch, in words"""


@dataclass(frozen=True)
class AttentionImage:
    """An image with its attention maps."""

    image: str
    true: str
    predicted: str
    pooled: HeatMap
    rollout: HeatMap


@dataclass(frozen=True)
class AttentionImages:
    """Images with their attention maps, and how to read the maps."""

    pooling: str
    """what the weights of `AttentionImage.pooled` are"""
    uniform: str
    """the weight of each patch if all were equal"""
    images: list[AttentionImage]


def most_confident_mistakes(evaluated: EvaluatedRun) -> list[Mistake]:
    """Return the misclassified images with the highest confidence, in descending order.

    Raises:
        UserError: if one of them cannot be decoded.
    """
    evaluation, classes = evaluated.evaluation, class_names(evaluated)
    wrong = (evaluation.predicted != evaluation.labels).nonzero()[:, 0]
    chosen = wrong[evaluation.confidence[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES]
    if not len(chosen):
        return []
    pixels = evaluated.dataset.test.pixels(chosen, evaluated.run.input_size)
    return [
        Mistake(
            png(image),
            classes[evaluation.labels[sample]],
            classes[evaluation.predicted[sample]],
            f"{evaluation.confidence[sample].item():.1%}",
        )
        for sample, image in zip(chosen.tolist(), pixels, strict=True)
    ]


def attention_images(evaluated: EvaluatedRun) -> AttentionImages:
    """Return the attention maps of the first image of each of the first six classes.

    Raises:
        UserError: if the model has no attention maps, or if an image cannot be decoded.
    """
    run, evaluation, classes = evaluated.run, evaluated.evaluation, class_names(evaluated)
    samples = evaluated.dataset.test.first_of_each_class(MAX_ATTENTION_IMAGES)
    pixels = evaluated.dataset.test.pixels(samples, run.input_size)
    maps = attention_maps(run.model, run.preprocess(pixels))
    images = [
        AttentionImage(
            png(image),
            classes[evaluation.labels[sample]],
            classes[evaluation.predicted[sample]],
            _draw_heat_map(image, pooled),
            _draw_heat_map(image, rollout),
        )
        for sample, image, pooled, rollout in zip(samples.tolist(), pixels, maps.pooled, maps.rollout, strict=True)
    ]
    return AttentionImages(maps.pooling, f"{1 / (maps.grid[0] * maps.grid[1]):.1%}", images)


def class_names(evaluated: EvaluatedRun) -> tuple[str, ...]:
    """Return a name for each output of the model; outputs beyond the data set's classes are named by their index."""
    names = evaluated.dataset.classes
    return (*names, *map(str, range(len(names), evaluated.evaluation.num_classes)))


def _draw_heat_map(image: Tensor, weights: Tensor) -> HeatMap:
    """Draw weights (rows, columns) over the gray image, uint8 (1 or 3, height, width); large weights are bright."""
    height, width = image.shape[1:]
    enlarged = F.interpolate(weights[None, None], (height, width), mode="nearest")[0, 0]
    heat = colormaps["inferno"]((enlarged / enlarged.max().clamp(min=1e-12)).numpy())[..., :3]
    gray = image.float().mean(0)[..., None] / 255
    mixed = OPACITY * torch.from_numpy(heat) + (1 - OPACITY) * gray
    largest = int(weights.argmax())
    row, column = divmod(largest, weights.shape[1])
    maximum = f"max. {weights.flatten()[largest].item():.1%}, row {row + 1}, column {column + 1}"
    return HeatMap(png((255 * mixed).round().byte().permute(2, 0, 1)), maximum)


def png(image: Tensor) -> str:
    """Return an image, uint8 (1 or 3, height, width), as a data: URI; the pixels of a small image are repeated."""
    times = max(1, MIN_SIDE // min(image.shape[1:]))
    large = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    buffer = BytesIO()
    Image.fromarray(in_color(large).permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

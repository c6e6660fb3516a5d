"""What a model makes of images, for a page: its most confident mistakes, and where it looks."""

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

MOST_MISTAKES = 12
MOST_LOOKED_AT = 6
SIDE = 128
"""pixels that a small image is enlarged to, about"""


@dataclass(frozen=True)
class Mistake:
    image: str
    """a data: URI of a PNG, as all images here"""
    true: str
    predicted: str
    confidence: str


@dataclass(frozen=True)
class WeightMap:
    """Weights over an image's patches."""

    image: str
    most: str
    """where the largest is, and how large it is"""


@dataclass(frozen=True)
class Look:
    """An image and where the model looks in it."""

    image: str
    true: str
    predicted: str
    pooled: WeightMap
    rollout: WeightMap


@dataclass(frozen=True)
class ImageMaps:
    """Images that the model looked at, and how to read its maps of them."""

    pooling: str
    """what the weights of the first map are"""
    even: str
    """what each patch would have if none were looked at more than another"""
    images: list[Look]


def mistakes(evaluated: EvaluatedRun) -> list[Mistake]:
    """The images that the model is most sure of and wrong about, surest first.

    Raises:
        UserError: where one of them can't be decoded.
    """
    said, classes = evaluated.evaluation, class_names(evaluated)
    wrong = (said.predicted != said.labels).nonzero()[:, 0]
    surest = wrong[said.confidence[wrong].argsort(descending=True, stable=True)][:MOST_MISTAKES]
    if not len(surest):
        return []
    pixels = evaluated.dataset.test.pixels(surest, evaluated.run.image_size)
    return [
        Mistake(
            png(image),
            classes[said.labels[sample]],
            classes[said.predicted[sample]],
            f"{said.confidence[sample].item():.1%}",
        )
        for sample, image in zip(surest.tolist(), pixels, strict=True)
    ]


def looks(evaluated: EvaluatedRun) -> ImageMaps:
    """Where the model looks in the first image of each class, of the first six.

    Raises:
        UserError: where the model's attention can't be looked at, or an image can't be decoded.
    """
    run, said, classes = evaluated.run, evaluated.evaluation, class_names(evaluated)
    labels = said.labels
    firsts = evaluated.dataset.test.first_of_each_class(MOST_LOOKED_AT)
    pixels = evaluated.dataset.test.pixels(firsts, run.image_size)
    seen = attention_maps(run.model, run.preprocess(pixels))
    images = [
        Look(
            png(image),
            classes[labels[sample]],
            classes[said.predicted[sample]],
            _weight_map(image, pooled),
            _weight_map(image, rollout),
        )
        for sample, image, pooled, rollout in zip(firsts.tolist(), pixels, seen.pooled, seen.rollout, strict=True)
    ]
    return ImageMaps(seen.pooling, f"{1 / (seen.grid[0] * seen.grid[1]):.1%}", images)


def class_names(evaluated: EvaluatedRun) -> tuple[str, ...]:
    """A name per output of the model; outputs beyond the data set's classes have their number."""
    names = evaluated.dataset.classes
    return (*names, *map(str, range(len(names), evaluated.evaluation.num_classes)))


def _weight_map(image: Tensor, weights: Tensor) -> WeightMap:
    """Weights (rows, columns) over an image, uint8 (3, height, width), grey below them; light where they are large."""
    height, width = image.shape[1:]
    spread = F.interpolate(weights[None, None], (height, width), mode="nearest")[0, 0]
    heat = colormaps["inferno"]((spread / spread.max().clamp(min=1e-12)).numpy())[..., :3]
    grey = image.float().mean(0)[..., None] / 255
    mixed = OPACITY * torch.from_numpy(heat) + (1 - OPACITY) * grey
    largest = int(weights.argmax())
    row, column = divmod(largest, weights.shape[1])
    most = f"most: {weights.flatten()[largest].item():.1%}, row {row + 1}, column {column + 1}"
    return WeightMap(png((255 * mixed).round().byte().permute(2, 0, 1)), most)


def png(image: Tensor) -> str:
    """An image, uint8 (3, height, width), as a data: URI; a small one has each pixel repeated, so that it is seen."""
    times = max(1, SIDE // min(image.shape[1:]))
    large = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
    buffer = BytesIO()
    Image.fromarray(large.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

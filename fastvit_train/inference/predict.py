"""Predict the classes of images with a trained model: the verb `predict`."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastvit_train.data.decode import (
    ImageFiles,
    Unreadable,
    count_transparent,
    describe_transparency,
    try_decode_all,
)
from fastvit_train.data.sources.image_paths import expand_paths
from fastvit_train.inference.trained_model import TrainedModel, load_run, non_finite_error
from fastvit_train.runs.plots.figures import plot_images
from fastvit_train.utils import atomic_io
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, printable

IMAGES_PER_FIGURE = 36


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for an image, or why the image could not be read."""

    image: str
    top: tuple[tuple[str, float], ...] = ()
    """the most probable classes and their probabilities, in descending order"""
    error: str | None = None

    def __str__(self) -> str:
        return self.error or ", ".join(f"{name} {probability:.1%}" for name, probability in self.top)

    def as_json(self) -> str:
        """Return one line of JSON: image and top, a list of objects with class and probability, or image and error."""
        if self.error is not None:
            return json.dumps({"image": self.image, "error": self.error})
        top = [{"class": name, "probability": probability} for name, probability in self.top]
        return json.dumps({"image": self.image, "top": top})


def predict_images(
    run: str,
    images: Sequence[str],
    *,
    top: int,
    batch_size: int,
    as_json: bool,
    show: bool,
    output: Path | None,
    checkpoint: str | None = None,
) -> int:
    """Print the predictions of a trained model for images; returns the number of images that could not be read.

    Args:
        run: as in `load_run`.
        images: files, folders (with their subfolders), patterns, or "-" for standard input: an image, or names of
            images, one per line.
        top: number of classes to print for each image.
        batch_size: images per forward pass.
        as_json: print a line of JSON per image instead of a table.
        show: also draw the images with their predictions.
        output: folder for these figures; by default predictions/ in the run's folder.
        checkpoint: as in `load_run`.

    Raises:
        UserError: if the model is not available, if there are no images, or if the model's outputs are NaN or inf.
    """
    for flag, number in (("--top", top), ("--batch-size", batch_size)):
        if number < 1:
            raise UserError(f"{flag} {number} is out of range; allowed: 1 or more")
    loaded = load_run(run, checkpoint=checkpoint)
    loaded.print_checkpoint()
    predictions: list[Prediction] = []
    shown: list[Tensor] = []
    with expand_paths(images, "predict") as files:
        for batch, pixels in _predict_batches(loaded, files, min(top, loaded.num_classes), batch_size):
            predictions += batch
            shown += [pixels] if show else []
            if as_json:
                print("\n".join(prediction.as_json() for prediction in batch), flush=True)
        transparent = count_transparent([path for _, path in files])
    if not as_json and any(prediction.top for prediction in predictions):
        _print_table(loaded, predictions)
    for prediction in predictions:
        if prediction.error is not None:
            print(prediction.error, file=sys.stderr)
    if line := describe_transparency(transparent, loaded.rendering.background):
        print(line, file=sys.stderr)
    if show and any(prediction.top for prediction in predictions):
        folder = output or loaded.output_folder("predictions")
        _draw([prediction for prediction in predictions if prediction.error is None], torch.cat(shown), folder)
        print(f"written to {folder}", file=sys.stderr if as_json else sys.stdout)
    return sum(prediction.error is not None for prediction in predictions)


def _predict_batches(
    loaded: TrainedModel, files: Sequence[tuple[str, Path]], top: int, batch_size: int
) -> Iterator[tuple[list[Prediction], Tensor]]:
    """Yield per batch the predictions and the images that could be read, uint8 (images, channels, height, width)."""
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        images = try_decode_all(ImageFiles([path for _, path in batch], loaded.rendering), loaded.input_size)
        readable = [pixels for pixels in images if isinstance(pixels, Tensor)]
        pixels = torch.stack(readable) if readable else torch.empty(0, *loaded.input_size, dtype=torch.uint8)
        ranked = _probabilities(loaded, pixels).topk(top) if readable else None
        rows = iter(zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)) if ranked else iter(())
        predictions = []
        for (name, _), image in zip(batch, images, strict=True):
            if isinstance(image, Unreadable):
                error = str(UserError(str(Unreadable(Path(name), image.reason))))
                predictions.append(Prediction(name, error=error))
            else:
                values, classes = next(rows)
                predictions.append(
                    Prediction(name, tuple(zip((loaded.classes[i] for i in classes), values, strict=True)))
                )
        yield predictions, pixels


def _probabilities(loaded: TrainedModel, pixels: Tensor) -> Tensor:
    probabilities = loaded.predict(pixels).cpu()
    if not probabilities.isfinite().all():
        raise non_finite_error(loaded)
    return probabilities


def _print_table(loaded: TrainedModel, predictions: Sequence[Prediction]) -> None:
    console = Terminal()
    table = Table("image", "class", "probability", "next classes")
    for prediction in predictions:
        if prediction.top:
            (name, probability), *rest = prediction.top
            others = ", ".join(f"{other} {share:.1%}" for other, share in rest)
            table.add_row(*map(escape, (printable(prediction.image), name, f"{probability:.1%}", others)))
    console.print(table)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in loaded.normalisation)
    resized = loaded.rendering.describe(f"{loaded.input_size} pixels")
    console.print(
        f"{loaded.source}: each image was resized {resized}; then it was normalized with mean {mean} and standard "
        f"deviation {std}",
        markup=False,
        soft_wrap=True,
    )


def _draw(predictions: Sequence[Prediction], pixels: Tensor, folder: Path) -> None:
    with atomic_io.as_save_error(f"{folder} cannot be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(predictions), IMAGES_PER_FIGURE):
        part = predictions[start : start + IMAGES_PER_FIGURE]
        captions = [f"{Path(item.image).name}\n{item.top[0][0]} {item.top[0][1]:.1%}" for item in part]
        plot_images(
            pixels[start : start + IMAGES_PER_FIGURE], captions, folder / f"{start // IMAGES_PER_FIGURE + 1}.png"
        )

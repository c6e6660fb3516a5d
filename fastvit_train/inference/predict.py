"""What a trained model says of images: the verb `predict`."""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastvit_train.data.image_paths import STANDARD_INPUT, expand_paths
from fastvit_train.data.images import decode
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.runs.plots import plot_images
from fastvit_train.utils import atomic_io
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, printable

PER_PICTURE = 36


@dataclass(frozen=True)
class Prediction:
    """What a model said of an image, or why it couldn't be shown to it."""

    image: str
    top: tuple[tuple[str, float], ...] = ()
    """the most probable classes with their probabilities, most probable first"""
    error: str | None = None

    def __str__(self) -> str:
        return self.error or ", ".join(f"{name} {probability:.1%}" for name, probability in self.top)

    def as_json(self) -> str:
        """On one line: `{"image": ..., "top": [{"class": ..., "probability": ...}]}`, or with "error" for "top"."""
        if self.error is not None:
            return json.dumps({"image": self.image, "error": self.error})
        top = [{"class": name, "probability": probability} for name, probability in self.top]
        return json.dumps({"image": self.image, "top": top})


def predict_images(
    run: str, images: Sequence[str], *, top: int, batch_size: int, as_json: bool, show: bool, output: Path | None
) -> int:
    """Print what the model that `run` names says of images; returns how many of them couldn't be read.

    Args:
        run: as in `load_run`.
        images: files, folders (all images below), patterns, or "-" for standard input: an image, or names of images,
            one per line.
        top: classes to tell of each image.
        batch_size: images per forward pass.
        as_json: a line of JSON per image instead of a table.
        show: draw the images with their predictions too.
        output: folder for these pictures; by default predictions/ in the run's folder.

    Raises:
        UserError: where the model or any image at all isn't to be had.
    """
    for flag, number in (("--top", top), ("--batch-size", batch_size)):
        if number < 1:
            raise UserError(f"{flag} {number} is out of range; allowed: 1 or more")
    loaded = load_run(run)
    said: list[Prediction] = []
    seen: list[Tensor] = []
    with expand_paths(images, "predict") as files:
        for predictions, pixels in _predicted(loaded, files, min(top, loaded.num_classes), batch_size):
            said += predictions
            seen += [pixels] if show else []
            if as_json:
                print("\n".join(prediction.as_json() for prediction in predictions), flush=True)
    if not as_json and any(prediction.top for prediction in said):
        _print_table(loaded, said)
    for prediction in said:
        if prediction.error is not None:
            print(prediction.error, file=sys.stderr)
    if show and any(prediction.top for prediction in said):
        folder = output or (loaded.folder or Path()) / "predictions"
        _draw([prediction for prediction in said if prediction.error is None], torch.cat(seen), folder)
        print(f"pictures written to {folder}", file=sys.stderr if as_json else sys.stdout)
    return sum(prediction.error is not None for prediction in said)


def _predicted(
    loaded: TrainedModel, files: Sequence[tuple[str, Path]], top: int, batch_size: int
) -> Iterator[tuple[list[Prediction], Tensor]]:
    """Batch by batch the predictions, and the images that could be read, uint8 (images, 3, size, size)."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            read = list(pool.map(lambda file: _read(file, loaded.image_size), batch))
            good = [pixels for pixels in read if isinstance(pixels, Tensor)]
            pixels = torch.stack(good) if good else torch.empty(0, 3, loaded.image_size, loaded.image_size)
            ranked = _probabilities(loaded, pixels).topk(top) if good else None
            rows = iter(zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)) if ranked else iter(())
            said = []
            for (name, _), result in zip(batch, read, strict=True):
                if isinstance(result, str):
                    said.append(Prediction(name, error=result))
                else:
                    values, classes = next(rows)
                    said.append(Prediction(name, tuple(zip((loaded.classes[i] for i in classes), values, strict=True))))
            yield said, pixels


def _probabilities(loaded: TrainedModel, pixels: Tensor) -> Tensor:
    probabilities = loaded.predict(pixels).cpu()
    if not probabilities.isfinite().all():
        raise UserError(f"{loaded.source} answers with infinities or no numbers: its weights are spoilt")
    return probabilities


def _read(file: tuple[str, Path], image_size: int) -> Tensor | str:
    name, path = file
    try:
        return decode(path, image_size)
    except UserError as error:
        return str(error).replace(str(path), name) if name == STANDARD_INPUT else str(error)


def _print_table(loaded: TrainedModel, said: Sequence[Prediction]) -> None:
    console = Terminal()
    table = Table("image", "class", "probability", "then")
    for prediction in said:
        if prediction.top:
            (name, probability), *rest = prediction.top
            then = ", ".join(f"{other} {chance:.1%}" for other, chance in rest)
            table.add_row(*map(escape, (printable(prediction.image), name, f"{probability:.1%}", then)))
    console.print(table)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in loaded.normalisation)
    console.print(
        f"{loaded.source}: images resized to {loaded.image_size} pixels on the shorter side (bilinear), the centre cut "
        f"out; normalised by mean {mean} and standard deviation {std}",
        markup=False,
        soft_wrap=True,
    )


def _draw(said: Sequence[Prediction], pixels: Tensor, folder: Path) -> None:
    with atomic_io.as_save_error(f"{folder} can't be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(said), PER_PICTURE):
        part = said[start : start + PER_PICTURE]
        captions = [f"{Path(one.image).name}\n{one.top[0][0]} {one.top[0][1]:.1%}" for one in part]
        plot_images(pixels[start : start + PER_PICTURE], captions, folder / f"{start // PER_PICTURE + 1}.png")

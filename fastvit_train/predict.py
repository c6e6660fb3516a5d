"""What a trained model says of images: the verb `predict`."""

import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastvit_train.data.folder import EXTENSIONS
from fastvit_train.data.images import MAX_FILE_BYTES, decode
from fastvit_train.errors import UserError, printable
from fastvit_train.loaded import LoadedRun, load_run
from fastvit_train.plots import plot_images

STANDARD_INPUT = "-"
SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6")
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
    if top < 1 or batch_size < 1:
        raise UserError(f"--top {top} or --batch-size {batch_size} is out of range; allowed: 1 or more")
    loaded = load_run(run)
    said: list[Prediction] = []
    seen: list[Tensor] = []
    with _found(images) as files:
        for predictions, pixels in _predicted(loaded, files, min(top, loaded.num_classes), batch_size):
            said += predictions
            seen += [pixels] if show else []
            if as_json:
                print("\n".join(prediction.as_json() for prediction in predictions), flush=True)
    if not as_json:
        _print_table(loaded, said)
    for prediction in said:
        if prediction.error is not None:
            print(prediction.error, file=sys.stderr)
    if show:
        folder = output or (loaded.folder or Path()) / "predictions"
        _draw([prediction for prediction in said if prediction.error is None], torch.cat(seen), folder)
        print(f"pictures written to {folder}", file=sys.stderr if as_json else sys.stdout)
    return sum(prediction.error is not None for prediction in said)


def _predicted(
    loaded: LoadedRun, files: Sequence[tuple[str, Path]], top: int, batch_size: int
) -> Iterator[tuple[list[Prediction], Tensor]]:
    """Batch by batch the predictions, and the images that could be read, uint8 (images, 3, size, size)."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            read = list(pool.map(lambda file: _read(file, loaded.image_size), batch))
            good = [pixels for pixels in read if isinstance(pixels, Tensor)]
            pixels = torch.stack(good) if good else torch.empty(0, 3, loaded.image_size, loaded.image_size)
            ranked = loaded.predict(pixels).cpu().topk(top) if good else None
            rows = iter(zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)) if ranked else iter(())
            said = []
            for (name, _), result in zip(batch, read, strict=True):
                if isinstance(result, str):
                    said.append(Prediction(name, error=result))
                else:
                    values, classes = next(rows)
                    said.append(Prediction(name, tuple(zip((loaded.classes[i] for i in classes), values, strict=True))))
            yield said, pixels


def _read(file: tuple[str, Path], image_size: int) -> Tensor | str:
    name, path = file
    try:
        return decode(path, image_size)
    except UserError as error:
        return str(error).replace(str(path), name) if name == STANDARD_INPUT else str(error)


@contextmanager
def _found(images: Sequence[str]) -> Iterator[list[tuple[str, Path]]]:
    """The files that `images` stand for, each with the name that it is called by."""
    if not images:
        raise UserError("predict takes images after the run, as in: predict runs/NAME cat.png photos/ '*.jpg'")
    with tempfile.TemporaryDirectory() as folder:
        files: list[tuple[str, Path]] = []
        for name in images:
            if name == STANDARD_INPUT:
                files += _from_standard_input(Path(folder))
            else:
                files += [(str(path), path) for path in _expand(name)]
        yield files


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(
            Path(where) / file
            for where, _, names in os.walk(path)
            for file in names
            if Path(file).suffix.lower() in EXTENSIONS
        )
        if not found:
            raise UserError(f"folder {name} holds no images; allowed: {' '.join(sorted(EXTENSIONS))}")
        return found
    if not path.exists() and glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"nothing is named like {name!r}; ** stands for folders in between")
        return found
    return [path]


def _from_standard_input(folder: Path) -> list[tuple[str, Path]]:
    """An image, or names of images, one per line."""
    content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if content.startswith(SIGNATURES):
        path = folder / "image"
        path.write_bytes(content)
        return [(STANDARD_INPUT, path)]
    names = [line for line in os.fsdecode(content).splitlines() if line.strip()]
    if not names or any("\0" in name for name in names):
        raise UserError("standard input holds neither an image nor names of images, one per line")
    return [(str(path), path) for name in names for path in _expand(name)]


def _print_table(loaded: LoadedRun, said: Sequence[Prediction]) -> None:
    console = Console(highlight=False)
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror or error}); choose another --output") from None
    for start in range(0, len(said), PER_PICTURE):
        part = said[start : start + PER_PICTURE]
        captions = [f"{Path(one.image).name}\n{one.top[0][0]} {one.top[0][1]:.1%}" for one in part]
        plot_images(pixels[start : start + PER_PICTURE], captions, folder / f"{start // PER_PICTURE + 1}.png")

"""Trained models, written for others to run; each is read back as they would, and compared, before it is in place."""

import importlib.util
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from torch import Tensor, nn

from fastvit_train import __version__
from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.data.loader import Preprocess
from fastvit_train.inference.trained_model import FOLDER, TrainedModel, load_run, non_finite_error
from fastvit_train.models import pretrained_cfg
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.timm_config import write_timm_config

TOLERANCE = 1e-4
"""largest difference of a logit"""
MOST_IMAGES, BATCH = 256, 64
RESIZE = "shorter side to image_size, bilinear with antialiasing; centre cut out"
METADATA = "metadata.json"
Answer = Callable[[Tensor], Tensor]
"""from uint8 images, (batch, 3, size, size), to logits, (batch, classes)"""


@dataclass(frozen=True)
class Format:
    """A way to write a model, and how those who are given it read it."""

    name: str
    """of the file or folder, where no other is asked for"""
    write: Callable[[TrainedModel, Path], None]
    read: Callable[[Path], Answer]
    needs: tuple[str, ...] = ()
    """modules of the extra `export`"""


def export_run(run: str, to: str, output: Path | None) -> Path:
    """Write a trained model in the format `to`, one of `FORMATS`, and say how near the read-back one is.

    Args:
        run: as in `load_run`; the model computes on the CPU.
        to: onnx and torch-export take uint8 images and normalise them inside; safetensors and timm are weights, with
            what is needed to build the model and to feed it.
        output: where to; by default into the folder `export` of the run.

    Returns:
        The file or folder.

    Raises:
        UserError: where the model can't be had, or not in that format, or what was read back differs by more than
            `TOLERANCE`; nothing is written then.
    """
    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}; allowed: {', '.join(FORMATS)}")
    form = FORMATS[to]
    missing = [module for module in form.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--to {to} needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    suffix = Path(form.name).suffix
    if output is not None and output.suffix != suffix and suffix:
        raise UserError(f"--output {output} is no name for what --to {to} writes; allowed: one that ends in {suffix}")
    loaded = load_run(run, device="cpu")
    final = output or (loaded.folder or Path()) / "export" / form.name
    with (
        atomic_io.as_save_error(f"{final} can't be written; choose another --output"),
        atomic_io.staged(final) as partial,
    ):
        said = write_verified(loaded, to, partial)
    print(f"written to {printable(str(final))}: {said}")
    return final


def write_verified(run: TrainedModel, to: str, path: Path) -> str:
    """Write `run`, which is on the CPU, to `path` and read it back; returns in words how near the two are.

    Raises:
        UserError: where it can't be written in that format, or not read back, or answers otherwise.
    """
    form = FORMATS[to]
    images, dataset = _images(run)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            form.write(run, path)
            answer = form.read(path)
            difference = _difference(run, answer, images)
    except OSError:
        raise
    except Exception as error:  # exporters raise anything at what they don't know
        raise UserError(f"{run.source} can't be written as {to}: {_reason(error)}; try another --to") from None
    if not math.isfinite(difference):
        raise non_finite_error(run)
    if difference > TOLERANCE:
        raise UserError(
            f"{run.source} written as {to} and read back gives other logits, by up to {difference:.1e}; "
            f"allowed: {TOLERANCE:.0e}; try another --to"
        )
    return f"largest difference of a logit {difference:.1e} over {len(images)} images of {printable(dataset)}"


def describe(run: TrainedModel) -> dict[str, str]:
    """What who is given the weights must know to build the model, feed it and read its answers; lists are JSON."""
    mean, std = run.normalisation
    return {
        "architecture": run.architecture,
        "model_args": json.dumps(get_model_args(run.model)),
        "class_names": json.dumps(run.classes),
        "image_size": str(run.image_size),
        "resize": RESIZE,
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "fastvit_train": __version__,
    }


class _FromPixels(nn.Module):
    """The model with the normalisation inside: uint8 RGB images (batch, 3, size, size) to logits (batch, classes)."""

    def __init__(self, run: TrainedModel) -> None:
        super().__init__()
        self.model = run.model
        self.preprocess = Preprocess(*run.normalisation, run.image_size, run.device)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocess(images))


def _example(run: TrainedModel) -> tuple[Tensor]:
    # Of one image, an exporter would conclude that there is never another.
    return (torch.zeros(2, 3, run.image_size, run.image_size, dtype=torch.uint8),)


def _write_onnx(run: TrainedModel, path: Path) -> None:
    program = torch.onnx.export(
        _FromPixels(run).eval(),
        _example(run),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props.update(describe(run))
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch(run: TrainedModel, path: Path) -> None:
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(_FromPixels(run).eval(), _example(run), dynamic_shapes=batch)
    torch.export.save(program, path, extra_files={METADATA: json.dumps(describe(run), indent=1)})


def _read_torch(path: Path) -> Answer:
    return torch.export.load(path).module()


def _write_safetensors(run: TrainedModel, path: Path) -> None:
    _write_weights(run, path, describe(run))


def _write_weights(run: TrainedModel, path: Path, said: dict[str, str]) -> None:
    weights = {name: value.clone().contiguous() for name, value in run.model.state_dict().items()}
    save_file(weights, path, {"format": "pt", **said})


def _read_safetensors(path: Path) -> Answer:
    with safe_open(path, "pt") as file:
        said = file.metadata()
    model = timm.create_model(said["architecture"], **json.loads(said["model_args"]))
    model.load_state_dict(load_file(path))
    return _fed(model, json.loads(said["mean"]), json.loads(said["std"]), int(said["image_size"]))


def _write_timm(run: TrainedModel, path: Path) -> None:
    path.mkdir()
    _write_weights(run, path / "model.safetensors", {})  # several would stand in another order every time
    mean, std = run.normalisation
    feeding: dict[str, Any] = {"input_size": (3, run.image_size, run.image_size), "mean": mean, "std": std}
    said: dict[str, Any] = {"label_names": list(run.classes)}
    if run.config is not None:  # what timm says of its own weights doesn't hold for those trained afresh
        feeding |= {"interpolation": "bilinear", "crop_pct": 1.0}
        said["pretrained_cfg"] = {"license": None}
    write_timm_config(run.model, path / "config.json", said, feeding)


def _read_timm(path: Path) -> Answer:
    model = timm.create_model(f"{FOLDER}{path}", pretrained=True)
    cfg = pretrained_cfg(model)
    return _fed(model, cfg["mean"], cfg["std"], cfg["input_size"][-1])


def _fed(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], image_size: int) -> Answer:
    model, preprocess = model.eval(), Preprocess(mean, std, image_size, torch.device("cpu"))
    return lambda images: model(preprocess(images))


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format("model.pt2", _write_torch, _read_torch),
    "safetensors": Format("model.safetensors", _write_safetensors, _read_safetensors),
    "timm": Format("timm", _write_timm, _read_timm),
}
"""by the name that --to takes"""


def _images(run: TrainedModel) -> tuple[Tensor, str]:
    """Real images to compare on, uint8 (up to 256, 3, size, size), and the name of the data set that they are of.

    They are the run's test images, from all over the set; where those aren't to be had, digits.
    """
    own = run.config.data if run.config is not None else DataConfig()
    try:
        # Files are decoded only as far as they are looked at; from no URL, nothing is downloaded.
        return _test_images(replace(own, stream="always", data_url="none:"), run.image_size)
    except UserError:
        return _test_images(DataConfig(), run.image_size)


def _test_images(config: DataConfig, size: int) -> tuple[Tensor, str]:
    dataset = load_dataset(config, size)
    count = len(dataset.test.labels)
    some = dataset.test.pixels(torch.linspace(0, count - 1, min(count, MOST_IMAGES)).long(), size)
    if some.shape[-1] != size:
        some = F.interpolate(some.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
    return some, dataset.name


def _difference(run: TrainedModel, answer: Answer, images: Tensor) -> float:
    """Largest difference of a logit, over a batch of one image and batches of 64; NaN where one is no number."""
    batches = [images[:1], *(batch for batch in images[1:].split(BATCH) if len(batch))]
    largest = [(answer(batch) - run.model(run.preprocess(batch))).abs().max() for batch in batches]
    return torch.stack(largest).max().item()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # exporters say in the last of many lines what is in the first cause
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__

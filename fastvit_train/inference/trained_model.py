"""Load trained models from a run's folder, a folder that timm wrote, the Hugging Face Hub, or timm."""

import sys
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastvit_train.config.init_from import FINAL
from fastvit_train.config.overrides import override
from fastvit_train.config.resolved import InputSize, ResolvedConfig
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.loader import Preprocess
from fastvit_train.data.rendering import Rendering
from fastvit_train.data.sources.hub import offline_if_unreachable
from fastvit_train.inference.checkpoints import Checkpoint, find_checkpoint
from fastvit_train.models import (
    build_model,
    check_attention,
    check_timm_folder,
    plain_attention,
    pretrained_cfg,
    set_attention,
)
from fastvit_train.models.attention import AUTO
from fastvit_train.models.pretrained.hub import HUB, needs_hub, unreachable_reason
from fastvit_train.models.pretrained.source import FOLDER
from fastvit_train.models.resolve import resolve
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.safe_load import read_json

MAX_CLASSES = 10**6
ALLOWED = f"the folder of a finished run, {FOLDER}FOLDER as written by timm, {HUB}USER/MODEL, or a timm model name"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in evaluation mode, with its preprocessing and the names of its classes."""

    source: str
    """what `load_run` was given"""
    folder: Path | None
    """the folder that holds the weights, and by default receives figures; None if the model is not in a folder"""
    config: ResolvedConfig | None
    """the run's configuration; None if the model does not come from a run of this package"""
    model: nn.Module
    architecture: str
    """the timm model name"""
    attention: str
    """the attention implementation"""
    class_names: tuple[str, ...] | None
    """the names of the outputs, if known"""
    input_size: InputSize
    """channels, height and width of the input"""
    checkpoint: Checkpoint | None = None
    """the checkpoint that was asked for; None for the final weights"""

    @property
    def name(self) -> str:
        """A short name for tables and titles."""
        return printable(self.folder.resolve().name if self.folder else self.source.rpartition("/")[2])

    def output_folder(self, verb: str) -> Path:
        """Return where a verb writes by default: a folder in that of the run, of its own for each checkpoint."""
        return (self.folder or Path()) / (verb if self.checkpoint is None else f"{verb}-{self.checkpoint.name}")

    def print_checkpoint(self) -> None:
        """Print which checkpoint was asked for, if any, to standard error."""
        if self.checkpoint is not None:
            print(self.checkpoint, file=sys.stderr)

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the outputs, or their indices if the names are not known."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, for pixels from 0 to 1."""
        cfg = pretrained_cfg(self.model)
        return tuple(cfg["mean"]), tuple(cfg["std"])

    @property
    def rendering(self) -> Rendering:
        """How image files become images: as in training, or as timm's entries of the model say."""
        if self.config is None:
            return Rendering.of_timm(pretrained_cfg(self.model))
        return Rendering.of(self.config.data)

    def dataset(self, data_dir: str | None = None) -> DatasetSpec:
        """Load the data set that the run was trained and evaluated on.

        Args:
            data_dir: the folder that holds the data; by default the folder that the run used.

        Raises:
            UserError: if the data set is not available, or if the model does not come from a run.
        """
        if self.config is None:
            raise UserError(f"{self.source} does not record a data set")
        data = self.config.data
        return load_dataset(replace(data, data_dir=data_dir or data.data_dir), self.input_size)

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Convert images, uint8 or float from 0 to 255, (batch, channels, height, width), to the model's inputs.

        Images of another height or width are resized.

        Raises:
            UserError: unless the images have four dimensions, and as many channels as the model takes.
        """
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != self.input_size.channels:
            raise UserError(
                f"images of shape {tuple(images_BCHW.shape)} do not fit {self.source}; "
                f"it takes (batch, {self.input_size.channels}, height, width)"
            )
        return Preprocess(*self.normalisation, self.input_size, self.device)(images_BCHW.to(self.device))

    @torch.no_grad()
    def predict(self, images_BCHW: Tensor) -> Tensor:
        """Return class probabilities, float32 (batch, classes), of images as `preprocess` takes them."""
        return self.model(self.preprocess(images_BCHW)).float().softmax(1)


def load_run(
    run: str | Path,
    attention: str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | int | None = None,
) -> TrainedModel:
    """Load a trained model, ready for inference.

    Args:
        run: the folder of a finished run, `local-dir:FOLDER`, `hf-hub:USER/MODEL`, or a timm model name; models of the
            last two kinds are downloaded unless they are cached.
        attention: the attention implementation; by default a plain one that runs on every machine. The weights are
            the same for all of them.
        device: by default torch's current accelerator, or the CPU if there is none.
        checkpoint: the weights of a run to load: "best" (of the best epoch), "last", or the step of one in its folder
            checkpoints/; by default the final weights of a finished run. With a checkpoint, the run need not be
            finished.

    Raises:
        UserError: if the model or the checkpoint does not exist or is damaged, or if the attention is not available.
    """
    source = str(run)
    folder = Path(source.removeprefix(FOLDER))
    try:
        is_run = (folder / "config.yaml").is_file()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{source} is not a run ({error.strerror}); allowed: {ALLOWED}") from None
    chosen = None
    if is_run:
        config = _read_config(folder, finished=checkpoint is None)
        if checkpoint is not None:
            chosen = find_checkpoint(folder, str(checkpoint), config.optim.ema is not None, config.run.keep_best_of)
        path = folder / FINAL if chosen is None else chosen.path
        weights = replace(config.model, weights=str(path), attention=AUTO, block="torch", patch_init="random")
        model = build_model(weights, config.input_size, config.num_classes)
        size = config.input_size
        architecture = config.model.model
    elif checkpoint is not None:
        raise UserError(f"{source} has no checkpoints, so leave --checkpoint {checkpoint} out; only a run's folder has")
    else:
        config = None
        model, architecture = _load_from_timm(source, folder)
        size = _input_size(model, source)
    attention = attention or plain_attention(model)
    check_attention(ModelConfig(architecture, attention))
    set_attention(model, attention)
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return TrainedModel(
        source,
        folder if folder.is_dir() else None,
        config,
        model.to(device).eval(),
        architecture,
        attention,
        _class_names(model, folder if config else None),
        size,
        chosen,
    )


def non_finite_error(run: TrainedModel, which: str = "") -> UserError:
    """Return the error to raise if the outputs of `run` are NaN or inf, for the images that `which` names."""
    hint = "its weights are damaged, or its training diverged; train it again"
    return UserError(f"the outputs of {run.source} are NaN or inf{which}: {hint}")


def _read_config(folder: Path, finished: bool) -> ResolvedConfig:
    """Return the run's configuration; the attention stays as recorded, even if it is not available here."""
    run = RunFolder(folder)
    recorded = override(TrainConfig(), run.read_config(), str(run.config))
    if finished and not (folder / FINAL).is_file():
        raise UserError(
            f"{folder} has no {FINAL}: the run is not finished; continue it with --resume must, or use the weights so "
            "far with --checkpoint best or last"
        )
    num_classes = recorded.model.num_classes or _read_timm_config(folder).get("num_classes")
    if not isinstance(num_classes, int) or not 0 < num_classes <= MAX_CLASSES:
        raise UserError(f"{folder} is not a finished run: its config.json has num_classes {num_classes!r}")
    never_downloads = replace(recorded, model=replace(recorded.model, pretrained=False))
    return resolve(never_downloads, num_classes)


def _read_timm_config(folder: Path) -> dict[str, Any]:
    try:
        entries = read_json(folder / "config.json")
        if not isinstance(entries, dict):
            raise ValueError("it is not a JSON object")
        return entries
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a finished run: its config.json cannot be read ({error})") from None


def _input_size(model: nn.Module, source: str) -> InputSize:
    size = InputSize(*pretrained_cfg(model)["input_size"])
    if size.channels not in (1, 3):
        raise UserError(f"{source} takes images of {size.channels} channels; allowed: models for 1 or 3 channels")
    return size


def _load_from_timm(source: str, folder: Path) -> tuple[nn.Module, str]:
    if folder.is_dir():
        check_timm_folder(folder)
        source = f"{FOLDER}{folder}"
    elif not source.startswith(HUB) and not timm.is_model(source):
        raise UserError(f"{source} is not a run; allowed: {ALLOWED}")
    with offline_if_unreachable() if needs_hub(source) else nullcontext(True) as reachable:
        try:
            model = timm.create_model(source, pretrained=True)
            architecture = pretrained_cfg(model)["architecture"]
        except Exception as error:  # a damaged folder or an unreachable host can raise any exception
            if not reachable:
                raise UserError(f"{source} cannot be loaded: {unreachable_reason(source)}") from None
            reason = str(error) or type(error).__name__
            raise UserError(f"{source} cannot be loaded: {reason}; allowed: {ALLOWED}") from None
    return model, str(architecture)


def _class_names(model: nn.Module, run: Path | None) -> tuple[str, ...] | None:
    names = _read_timm_config(run).get("label_names") if run else pretrained_cfg(model).get("label_names")
    if isinstance(names, list | tuple) and len(names) == model.num_classes:
        return tuple(printable(unicodedata.normalize("NFC", str(name))) for name in names)
    return None

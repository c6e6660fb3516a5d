"""Trained models, brought back: from a run's folder, a folder that timm wrote, the Hugging Face Hub, or timm."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastvit_train.config.overrides import override
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.loader import Preprocess
from fastvit_train.models import (
    build_model,
    check_attention,
    check_timm_folder,
    plain_attention,
    pretrained_cfg,
    set_attention,
)
from fastvit_train.models.attention import AUTO
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.inputs import image_size
from fastvit_train.training.setup import resolve
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.safe_load import read_json

MOST_CLASSES = 10**6
FOLDER, HUB = "local-dir:", "hf-hub:"
ALLOWED = f"the folder of a finished run, {FOLDER}FOLDER as timm writes one, {HUB}USER/MODEL, or a name of timm's"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in evaluation mode, with what is needed to feed it and to read its answers."""

    source: str
    """as it was asked for"""
    folder: Path | None
    """where its weights lie, and pictures of it go; None for a model from elsewhere"""
    config: TrainConfig | None
    """the run's settings; None for a model that no run of ours left"""
    model: nn.Module
    architecture: str
    """timm's name of the model"""
    attention: str
    class_names: tuple[str, ...] | None
    """what its outputs are called, where that is known"""
    image_size: int
    """side of the input, pixels"""

    @property
    def name(self) -> str:
        """For tables and files' names."""
        return printable(self.folder.resolve().name if self.folder else self.source.rpartition("/")[2])

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the outputs, or else their numbers."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of pixels from 0 to 1, that the model's input is normalised by."""
        cfg = pretrained_cfg(self.model)
        return tuple(cfg["mean"]), tuple(cfg["std"])

    def dataset(self, data_dir: str | None = None) -> DatasetSpec:
        """The data that the run was trained and evaluated on, from where it was then or from `data_dir`.

        Raises:
            UserError: where it isn't to be had, or the model brings no data set.
        """
        if self.config is None:
            raise UserError(f"{self.source} brings no data set")
        data = self.config.data
        return load_dataset(replace(data, data_dir=data_dir or data.data_dir), self.image_size)

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """uint8 or float images of 0 to 255, (batch, 3, height, width), to the model's input on its device."""
        return Preprocess(*self.normalisation, self.image_size, self.device)(images_BCHW.to(self.device))

    @torch.no_grad()
    def predict(self, images_BCHW: Tensor) -> Tensor:
        """Class probabilities, float32 (batch, classes), of uint8 or float images of 0 to 255, (batch, 3, h, w)."""
        return self.model(self.preprocess(images_BCHW)).float().softmax(1)


def load_run(run: str | Path, attention: str | None = None, device: torch.device | str | None = None) -> TrainedModel:
    """The trained model that `run` names, ready for use.

    Args:
        run: the folder of a finished run, `local-dir:FOLDER`, `hf-hub:USER/MODEL`, or a name of timm's; the last two
            are downloaded where they aren't cached.
        attention: how attention is computed; by default plainly, which any machine can. The weights are the same.
        device: where to; by default the accelerator that torch sees, or the CPU.

    Raises:
        UserError: where there is no such model, or it is damaged, or the attention can't be had.
    """
    source = str(run)
    folder = Path(source.removeprefix(FOLDER))
    try:
        is_run = (folder / "config.yaml").is_file()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{source} is no run ({error.strerror}); allowed: {ALLOWED}") from None
    if is_run:
        config = _config_of(folder)
        model = _model_of(folder, config)
        size = image_size(config)
        architecture = config.model.model
    else:
        config = None
        model, architecture = _from_timm(source, folder)
        size = int(pretrained_cfg(model)["input_size"][-1])
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
    )


def _config_of(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`, the attention that it was trained with among them, whatever can run here."""
    run = RunFolder(folder)
    recorded = override(TrainConfig(), run.read_config(), str(run.config))
    resolved = resolve(replace(recorded, model=replace(recorded.model, attention=AUTO)))
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors: it isn't finished; go on with --resume must")
    return replace(resolved, model=replace(resolved.model, attention=recorded.model.attention))


def _model_of(folder: Path, config: TrainConfig) -> nn.Module:
    outputs = config.model.num_classes or _described(folder).get("num_classes")
    if not isinstance(outputs, int) or not 0 < outputs <= MOST_CLASSES:
        raise UserError(f"{folder} is no finished run: its config.json has {outputs!r} classes")
    weights = str(folder / "model.safetensors")
    plain = replace(config.model, weights=weights, attention=AUTO, patch_init="random")
    return build_model(plain, image_size(config), outputs)


def _described(folder: Path) -> dict[str, Any]:
    try:
        described = read_json(folder / "config.json")
        if not isinstance(described, dict):
            raise ValueError("it holds no names")
        return described
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no finished run: its config.json can't be read ({error})") from None


def _from_timm(source: str, folder: Path) -> tuple[nn.Module, str]:
    if folder.is_dir():
        check_timm_folder(folder)
        source = f"{FOLDER}{folder}"
    elif not source.startswith(HUB) and not timm.is_model(source):
        raise UserError(f"{source} is no run; allowed: {ALLOWED}")
    try:
        model = timm.create_model(source, pretrained=True)
        architecture = pretrained_cfg(model)["architecture"]
    except Exception as error:  # a damaged folder, or a host that isn't reached, can raise anything
        raise UserError(f"{source} can't be loaded: {str(error) or type(error).__name__}; allowed: {ALLOWED}") from None
    return model, str(architecture)


def _class_names(model: nn.Module, run: Path | None) -> tuple[str, ...] | None:
    names = _described(run).get("label_names") if run else pretrained_cfg(model).get("label_names")
    if isinstance(names, list | tuple) and len(names) == model.num_classes:
        return tuple(printable(str(name)) for name in names)
    return None

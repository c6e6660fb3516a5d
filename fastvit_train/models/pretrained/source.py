"""What the name of a pretrained model stands for: an architecture, its sizes, its weights, and its normalization."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_model_args

from fastvit_train.config.resolved import InputSize, per_channel
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import FROM_DATA_DIR, HUGGING_FACE
from fastvit_train.data.sources.hub import offline_if_unreachable
from fastvit_train.models.build import check_model, check_timm_folder, pretrained_cfg_of
from fastvit_train.models.pretrained.hub import HUB, needs_hub, unreachable_reason
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_json

FOLDER = "local-dir:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""timm's names for a file of weights; of these, the first that exists is loaded"""
SIZES = ("in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "pos_embed")
"""the arguments of a model that are settings too"""
SET_OTHERWISE = ("num_classes", "img_size", "initializer_range", "drop_rate", "attn_drop_rate", "drop_path_rate")
"""the arguments of a model that do not decide which weights it has; the settings may have other values"""


def resolve_source(config: TrainConfig) -> TrainConfig:
    """Replace --pretrained and the name of a pretrained model by what they stand for.

    `model` may name a model of timm, `hf-hub:USER/MODEL` or `local-dir:FOLDER`. Settings that are None are filled in,
    `weights` among them. Without `pretrained`, nothing is downloaded or changed.

    Raises:
        UserError: if the model or its weights are not there, or if settings cannot describe the model.
    """
    model, data = config.model, config.data
    if not model.pretrained:
        if model.model.startswith((FOLDER, HUB)):
            raise UserError(
                f"--model {model.model} names a pretrained model; add --pretrained to start from its weights"
            )
        return config
    folder = _folder_of(model.model)
    check_timm_folder(folder)
    described = read_json(folder / "config.json")
    cfg = described.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, dict) else {}
    named = model.model if timm.is_model(model.model) else str(described["architecture"]).partition(".")[0]
    arguments = described.get("model_args") or {}
    sizes = {name: arguments[name] for name in SIZES if name in arguments}
    _check_arguments(model.model, named, arguments)
    found = {
        **sizes,
        "image_size": _image_size(arguments.get("img_size") or cfg.get("input_size")),
        "mean": _statistics(cfg.get("mean"), model.in_chans),
        "std": _statistics(cfg.get("std"), model.in_chans),
        "weights": str(_weights_in(folder, model.model)),
    }
    unset = {name: value for name, value in found.items() if getattr(model, name) is None}
    # The other data sets are images of one size, which are not cropped.
    are_files = data.dataset in FROM_DATA_DIR or data.dataset.startswith(HUGGING_FACE)
    if are_files and data.fit == "crop" and data.crop_pct is None and (crop_pct := cfg.get("crop_pct")):
        data = replace(data, crop_pct=min(crop_pct, 1.0))
    return replace(config, model=replace(model, model=named, pretrained=False, **unset), data=data)


def _folder_of(model: str) -> Path:
    """Return the folder with the model's config.json and its weights; what is not in the cache is downloaded."""
    if model.startswith(FOLDER):
        return Path(model.removeprefix(FOLDER))
    if model.startswith(HUB):
        return _download(model, model.removeprefix(HUB))
    check_model(model)
    cfg = pretrained_cfg_of(model)
    if cfg.hf_hub_id is None:
        where = f"; they are at {cfg.url}: download them and give --weights FILE" if cfg.url else ""
        raise UserError(f"--pretrained: the Hugging Face Hub has no weights for {model}{where}")
    return _download(model, str(cfg.hf_hub_id))


def _download(source: str, repo: str) -> Path:
    with offline_if_unreachable() if needs_hub(source) else nullcontext(True) as reachable:
        try:
            folder = Path(hf_hub_download(repo, "config.json")).parent
            _download_weights(repo)
            return folder
        except Exception as error:  # a name that is not valid or an unreachable host can raise any exception
            reason = unreachable_reason(source) if not reachable else str(error) or type(error).__name__
            raise UserError(f"--model {source} cannot be loaded: {reason.splitlines()[0]}") from None


def _download_weights(repo: str) -> None:
    try:
        hf_hub_download(repo, WEIGHTS[0])
    except EntryNotFoundError:
        hf_hub_download(repo, WEIGHTS[1])


def _weights_in(folder: Path, source: str) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--pretrained: {source} has no weights; it needs a file {' or '.join(WEIGHTS)}")


def _check_arguments(source: str, name: str, arguments: dict[str, Any]) -> None:
    """Raise UserError for arguments of the model that no setting can repeat."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        usual = get_model_args(timm.create_model(name))
    others = [
        f"{key}={value!r}"
        for key, value in arguments.items()
        if key not in (*SIZES, *SET_OTHERWISE) and value not in (None, usual.get(key))
    ]
    if others:
        raise UserError(f"--model {source} was built with {', '.join(others)}, which no setting can repeat")


def _statistics(values: Any, in_chans: int | None) -> tuple[float, ...] | None:
    if not isinstance(values, list) or len(values) not in (1, 3):
        return None
    return per_channel(tuple(values), in_chans or len(values))


def _image_size(size: Any) -> str | int | None:
    """Return the setting for the input's height and width: from a side, or from the last two of several numbers."""
    if isinstance(size, list | tuple) and len(size) > 1:
        return InputSize(3, *size[-2:]).image_size
    return size if isinstance(size, int) else None

"""Models by name: ours (registry.py) and timm's own."""

import logging
import pickle
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

import fastvit_kernels
from fastvit_train.config import ModelConfig
from fastvit_train.errors import UserError
from fastvit_train.models import registry
from fastvit_train.models.vit import ViT
from fastvit_train.models.weights import checkpoint_filter_fn, reset_head_if_other_classes

__all__ = [
    "OUR_MODELS",
    "ViT",
    "build_model",
    "check_model",
    "native_image_size",
    "pretrained_cfg",
    "resolve_attention",
]

log = logging.getLogger(__name__)
OUR_MODELS = sorted(name.partition(".")[0] for name in registry.default_cfgs)


def check_model(name: str) -> None:
    """Raise UserError unless `name` is one of our models or timm's."""
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"unknown model {name!r}{hint}; allowed: {', '.join(OUR_MODELS)}, or any of timm's names")


def resolve_attention(config: ModelConfig) -> str:
    """The attention implementation that `config` means: ours by name, "timm" where a model of timm's has its own."""
    if config.model not in OUR_MODELS:
        if config.attention not in (None, "timm"):
            raise UserError(
                f"attention {config.attention!r} can't be swapped into {config.model!r}; "
                f"models that take it: {', '.join(OUR_MODELS)}"
            )
        return "timm"
    name = config.attention or fastvit_kernels.DEFAULT
    try:
        fastvit_kernels.check_implementation(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    return name


def native_image_size(name: str) -> int:
    """The image side in pixels that the model is made for."""
    return int(_cfg_of_name(name).input_size[-1])


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's description of a model: its mean and std, its classifier's name, and so on."""
    cfg = model.pretrained_cfg
    assert isinstance(cfg, dict)
    return cfg


def _cfg_of_name(name: str) -> PretrainedCfg:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise UserError(f"timm knows no input size for {name!r}; take another --model")
    return cfg


def build_model(config: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    """The model that `config` describes, with `config.weights` loaded where given.

    Raises:
        UserError: for sizes that don't fit together, options the model doesn't take, or weights that don't fit.
    """
    sizes = {
        key: value
        for key, value in asdict(config).items()
        if value is not None and key not in ("model", "attention", "weights", "num_classes", "image_size")
    }
    options: dict[str, Any] = {**sizes, "num_classes": num_classes}
    if _cfg_of_name(config.model).fixed_input_size:
        options["img_size"] = image_size
    if config.model in OUR_MODELS:
        options["attention"] = resolve_attention(config)
    try:
        model = timm.create_model(config.model, **options)
    except TypeError as error:
        raise UserError(f"{config.model} does not take one of {', '.join(sizes)}: {error}") from None
    except (ValueError, AssertionError) as error:
        raise UserError(str(error)) from None
    if config.weights is not None:
        _load_weights(model, Path(config.weights))
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no weights at {path}; --weights takes a .pth, .pt or .safetensors file")
    try:
        state_dict = load_state_dict(str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} can't be read as weights: {reason}") from None
    if isinstance(model, ViT):
        state_dict = checkpoint_filter_fn(state_dict, model)
    if reset_head_if_other_classes(state_dict, model):
        log.warning("%s has another number of classes: its classifier is left out and starts afresh", path)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} doesn't fit the model: {reason[:400]}") from None

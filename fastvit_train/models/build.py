"""Models built from their settings: ours (registry.py) and timm's own."""

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from fastvit_train.config.resolved import InputSize, per_channel
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models.attention import set_attention
from fastvit_train.models.blocks import set_block
from fastvit_train.models.convert import (
    checkpoint_filter_fn,
    convert_by_timm,
    fit_channels,
    misfit,
    pretrained_cfg,
    reset_heads_if_other_classes,
)
from fastvit_train.models.registry import OUR_MODELS
from fastvit_train.models.vit import ConvTokenizer, ViT
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.runs.weights_file import read_weights
from fastvit_train.utils import machine
from fastvit_train.utils.errors import UserError, counted, did_you_mean
from fastvit_train.utils.safe_load import read_json

log = logging.getLogger(__name__)
NOT_SIZES = (
    *("model", "attention", "block", "weights", "init_from", "pretrained"),
    *("num_classes", "image_size", "patch_init", "mean", "std"),
)
LOAD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError)


def check_model(name: str) -> None:
    """Raise UserError unless `name` is one of our models or a timm model."""
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), most=3)
        raise UserError(f"unknown model {name!r}{hint}; allowed: {', '.join(OUR_MODELS)}, or any timm model name")


def pretrained_cfg_of(name: str) -> PretrainedCfg:
    """Return timm's description of the model `name`: its native input size, mean and standard deviation.

    Raises:
        UserError: if timm cannot describe the model.
    """
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"{name} cannot be built: {error}") from None
    if cfg is None:
        raise UserError(f"timm has no input size for {name!r}; choose another --model")
    return cfg


def native_input_size(name: str) -> InputSize:
    """Return the size of the input that the model `name` is designed for."""
    return InputSize(*pretrained_cfg_of(name).input_size)


def normalization(config: ModelConfig, cfg: dict[str, Any], channels: int) -> dict[str, tuple[float, ...]]:
    """Return "mean" and "std" of each channel: those in `config`, or else the model's own, which `cfg` holds.

    Raises:
        UserError: if `config` has another number of values than the input has channels.
    """
    result = {}
    for name in ("mean", "std"):
        given: tuple[float, ...] | None = getattr(config, name)
        values = per_channel(tuple(cfg[name]), channels) if given is None else given
        if len(values) != channels:
            raise UserError(
                f"--{name} has {counted(len(values), 'number')}, but the input has {counted(channels, 'channel')}; "
                "give a number for each channel (--in-chans)"
            )
        result[name] = values
    return result


def build_model(config: ModelConfig, input_size: InputSize, num_classes: int) -> nn.Module:
    """Build the model that `config` describes, and load `config.weights` if given.

    Args:
        config: settings of the model.
        input_size: channels, height and width of the input; the channels are those of `config`.
        num_classes: number of outputs.

    Raises:
        UserError: if sizes do not fit together, if the model does not have an option, if it does not support the
            attention or the block, or if the weights do not fit.
    """
    sizes = {key: value for key, value in asdict(config).items() if value is not None and key not in NOT_SIZES}
    options: dict[str, Any] = {**sizes, "num_classes": num_classes}
    if pretrained_cfg_of(config.model).fixed_input_size:
        height, width = input_size.sides
        options["img_size"] = height if height == width else (height, width)
    try:
        _check_memory(config.model, options)
        model = timm.create_model(config.model, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if config.model in OUR_MODELS:
            raise UserError(str(error)) from None
        raise UserError(f"{config.model} cannot be built with {options}: {error}") from None
    cfg = pretrained_cfg(model)
    vars(model)["pretrained_cfg"] = {**cfg, **normalization(config, cfg, input_size.channels)}
    _check_patches(model, config, input_size)
    set_attention(model, config.attention)
    set_block(model, config.block)
    if config.weights is not None:
        _load_weights(model, Path(config.weights), functools.partial(timm.create_model, config.model, **options))
    return model


def _check_memory(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError if the weights alone exceed the machine's memory, before any memory is allocated."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        needed = sum(parameter.nbytes for parameter in timm.create_model(name, **options).parameters())
    if needed > (total := machine.total_memory()):
        raise ValueError(
            f"its weights take {needed / 1e9:,.0f} GB, but this machine has {total / 1e9:,.0f} GB; "
            "make the model smaller"
        )


def check_timm_folder(folder: Path) -> None:
    """Raise UserError unless `folder` has timm's description of a known model that fits in memory."""
    try:
        described = read_json(folder / "config.json")
        name = str(described["architecture"]).partition(".")[0]  # without timm's tag for the weights
        if not timm.is_model(name):
            raise ValueError(f"{name!r:.100} is not the name of a model")
        _check_memory(name, described.get("model_args") or {})
    except Exception as error:  # the file may hold any arguments
        reason = str(error) or type(error).__name__
        raise UserError(f"{folder} is neither a run nor a model folder from timm: config.json: {reason}") from None


def _check_patches(model: nn.Module, config: ModelConfig, input_size: InputSize) -> None:
    """Raise UserError for a patch size that the model would ignore, and for images that it would crop silently."""
    tokenizer = getattr(model, "patch_embed", None)
    if isinstance(tokenizer, ConvTokenizer) and config.patch_size is not None:
        raise UserError(f"{config.model} computes its tokens by convolutions: omit --patch-size {config.patch_size}")
    patch = getattr(tokenizer, "patch_size", None) or 1
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if any(side % length for side, length in zip(input_size.sides, sides, strict=True)):
        raise UserError(
            f"image size {input_size.height}x{input_size.width} is not a multiple of patch size {max(sides)}"
        )


def _recorded_image_size(weights: Path) -> tuple[int, int] | None:
    """Return height and width of a model's input, from the config.json next to its weights, if any.

    That of a checkpoint lies in the run's folder, two levels up.
    """
    step = weights.parent
    run = RunFolder(step.parent.parent)
    folder = run.root if run.checkpoints == step.parent else step
    try:
        described = read_json(folder / "config.json")
        size = described.get("model_args", {}).get("img_size") or described["pretrained_cfg"]["input_size"][-2:]
        height, width = (size, size) if isinstance(size, int) else size
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # the file may hold anything
        return None


def _load_weights(model: nn.Module, path: Path, rebuild: Callable[..., nn.Module]) -> None:
    """Load a file of weights; `rebuild` builds the model again with other options."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; --weights takes a .pth, .pt, .ckpt or .safetensors file")
    try:
        state_dict = read_weights(path, model.state_dict())
    except Exception as error:  # torch's reader can raise anything for a damaged file
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}") from None
    size = _recorded_image_size(path)
    try:
        if isinstance(model, ViT):
            vars(model)["pretrained_model_args"] = {"img_size": size}
            state_dict = fit_channels(checkpoint_filter_fn(state_dict, model), model)
        elif misfit(state_dict, model) or (size is not None and size[0] != size[1]):
            rebuild = functools.partial(rebuild, pretrained_model_args={"img_size": size})
            state_dict = convert_by_timm(fit_channels(state_dict, model), model, rebuild)
        other_classes = reset_heads_if_other_classes(state_dict, model)
        if problem := misfit(state_dict, model):
            raise ValueError(problem)
        model.load_state_dict(state_dict)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{path} does not fit the model: {error}; give the --model and the sizes that it was trained with"
        ) from None
    if other_classes:
        log.warning(
            "%s has another number of classes: its classifier is not loaded; the model's is initialized randomly", path
        )

"""--init-from: the settings that let a run start from the model of a finished run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastvit_train.config import settings_file
from fastvit_train.config.overrides import to_plain, with_underscores
from fastvit_train.config.resolved import per_channel
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.utils.errors import UserError

FINAL = "model.safetensors"
"""the weights that a run ends with, in its folder"""
NOT_TAKEN = ("attention", "block", "num_classes", "pretrained", "init_from", "weights", "patch_init")
"""the settings of a model that another data set or another machine may need to be different"""


def with_model_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings`, by name, and under them those of the model of the run that they start from, if any.

    Args:
        settings: from flags, a file or keyword arguments; names have - or _.

    Raises:
        UserError: if `init_from` is not the folder of a finished run, or if `settings` name other weights.
    """
    run = settings.get("init_from", settings.get("init-from"))
    if run is None:
        return settings
    settings, model = with_underscores(settings), _model_of(str(run))
    if settings.get("weights") not in (None, model["weights"]):
        raise UserError(f"--init-from {run} brings its own weights; leave --weights {settings['weights']} out")
    return {**_with_channels(model, settings.get("in_chans")), **settings, "weights": model["weights"]}


def _with_channels(model: dict[str, Any], in_chans: object) -> dict[str, Any]:
    """Return the model's settings with the mean and standard deviation for as many channels as are asked for."""
    if str(in_chans) not in ("1", "3"):
        return model
    recorded = {name: model[name] for name in ("mean", "std") if _are_numbers(model[name])}
    return {**model, **{name: per_channel(tuple(values), int(str(in_chans))) for name, values in recorded.items()}}


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _model_of(run: str) -> dict[str, Any]:
    """Return the settings of the run's model, and its weights, by name."""
    folder = Path(run)
    try:
        recorded = settings_file.read(folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise UserError(f"--init-from {run} is not the folder of a run: config.yaml can't be read ({error})") from None
    weights = folder / FINAL
    if not weights.is_file():
        raise UserError(f"--init-from {run} is not finished: it has no {FINAL}; continue it with --resume must first")
    settings = {**to_plain(TrainConfig()), **with_underscores(recorded)}
    taken = {field.name: settings[field.name] for field in fields(ModelConfig) if field.name not in NOT_TAKEN}
    return {**taken, "init_from": run, "weights": str(weights), "patch_init": "random"}

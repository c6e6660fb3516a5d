"""Settings as a flat mapping of names: read, override, validate, compare."""

import functools
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any, get_type_hints

from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.synonyms import suggestion
from fastvit_train.config.validation import Mark, checked
from fastvit_train.utils.errors import UserError


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return all settings by name, as in config.yaml and on the command line."""
    return {key: value for section in asdict(config).values() for key, value in section.items()}


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """Return all settings by name as YAML holds them: lists instead of tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}


def with_underscores(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` by their names as keyword arguments."""
    return {key.replace("-", "_"): value for key, value in settings.items()}


def override(config: TrainConfig, settings: dict[str, Any], source: str) -> TrainConfig:
    """Return `config` with `settings` (by name, with - or _) replaced.

    Args:
        config: the base.
        settings: values by name; numbers may be strings.
        source: where the settings come from, for the error.

    Raises:
        UserError: if a name is unknown, or if a value has the wrong type or is out of range.
    """
    given, settings = settings, _with_fit_memory(with_underscores(settings))
    if len(settings) < len(given):
        raise UserError(f"{source} has the same key twice, once with - and once with _; remove one of them")
    names = list(flatten(config))
    for key in settings:
        if key not in names:
            hint = suggestion(key, names) or f"allowed: {', '.join(names)}"
            raise UserError(f"unknown key {key!r} in {source}; {hint}")
    return _converted(config, settings, source)


def _with_fit_memory(settings: dict[str, Any]) -> dict[str, Any]:
    """Write batch_size: auto as fit_memory: the batch size of the recipe stays, and decides how the model learns."""
    if settings.get("batch_size") != "auto":
        return settings
    return {**{key: value for key, value in settings.items() if key != "batch_size"}, "fit_memory": True}


def validate(config: TrainConfig) -> TrainConfig:
    """Return `config` with each value converted to the type of its setting.

    Raises:
        UserError: for the first setting that has the wrong type or is out of range, or if settings exclude each other.
    """
    config = _converted(config, flatten(config), "the settings")
    model = config.model
    source = f"--weights {model.weights}" if model.init_from is None else f"--init-from {model.init_from}"
    if model.pretrained and model.weights is not None:
        raise UserError(f"--pretrained brings its own weights; leave {source} out")
    if model.patch_init == "whiten" and (model.pretrained or model.weights is not None):
        source = "--pretrained" if model.pretrained else source
        raise UserError(
            f"--patch-init whiten would overwrite the patch projection from {source}; give --patch-init random"
        )
    if config.data.fit != "crop" and config.data.crop_pct not in (None, 1.0):
        raise UserError(f"--crop-pct is for --fit crop; leave it out, or leave out --fit {config.data.fit}")
    if config.run.patience is not None and config.run.extend:
        raise UserError("--patience decides when the run ends, so that there is nothing to --extend; give one of them")
    if config.run.patience is not None and config.run.average_last is not None:
        raise UserError(
            "--patience ends with the best epoch's weights, and --average-last with an average; give one of them"
        )
    return config


def _converted(config: TrainConfig, settings: dict[str, Any], source: str) -> TrainConfig:
    sections = {}
    for section in fields(config):
        part = getattr(config, section.name)
        hints = get_type_hints(type(part), include_extras=True)
        own = {key: checked(key, value, hints[key], source) for key, value in settings.items() if key in hints}
        sections[section.name] = replace(part, **own)
    return replace(config, **sections)


@functools.cache
def marked(mark: Mark) -> frozenset[str]:
    """Return the names of the settings that carry `mark` in `config.schema`."""
    sections = get_type_hints(TrainConfig).values()
    hints = {key: hint for section in sections for key, hint in get_type_hints(section, include_extras=True).items()}
    return frozenset(key for key, hint in hints.items() if mark in getattr(hint, "__metadata__", ()))


def map_marked(config: TrainConfig, mark: Mark, change: Callable[[Any], Any]) -> TrainConfig:
    """Return `config` with `change` applied to each setting that carries `mark` and is not None."""
    values = flatten(config)
    changed = {key: change(values[key]) for key in marked(mark) if values[key] is not None}
    return _converted(config, changed, "the settings")


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """List the settings that differ although a resumed run must have the same value, as `key: saved -> current`."""
    keys = [key for key in {**saved, **current} if key not in marked(Mark.MAY_CHANGE)]
    return [f"{k}: {saved.get(k)} -> {current.get(k)}" for k in keys if saved.get(k) != current.get(k)]

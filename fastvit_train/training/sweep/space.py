"""What a sweep searches: settings with a range or a list of values, such as lr=1e-3..3e-2:log momentum=0.9,0.95."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fastvit_train.config.overrides import flatten, override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.utils.errors import UserError, did_you_mean

FIXED = ("recipe", "exp_name", "runs_dir", "holdout", "holdout_seed", "epochs", "extend", "stop_after", "patience")
"""settings that name the trials, or without which they could not be compared"""
FORMS = "allowed: NAME=LOW..HIGH, NAME=LOW..HIGH:log, or NAME=VALUE,VALUE"


def parse(words: Sequence[str], config: TrainConfig) -> dict[str, BaseDistribution]:
    """Read what to search, by the name of the setting.

    Args:
        words: one per setting, as on the command line.
        config: the settings of all trials; each bound and value must be allowed in them.

    Raises:
        UserError: if a word is not of one of the forms, if a setting is unknown or occurs twice, if a range is empty,
            or if a value is not allowed.
    """
    space: dict[str, BaseDistribution] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not equals or not values:
            raise UserError(f"{word!r} says no values; {FORMS}")
        if name not in flatten(config):
            hint = did_you_mean(name, list(flatten(config)))
            raise UserError(f"{word}: unknown setting {name!r}{hint}; see `fastvit train --help`")
        if name in FIXED:
            raise UserError(f"{word}: all trials must have the same {name}, so that they can be compared; leave it out")
        if name in space:
            raise UserError(f"{word}: {name} occurs twice; give it once")
        space[name] = _range(name, values, config) if ".." in values else _choices(name, values, config)
    if not space:
        raise UserError(f"a sweep needs something to search, as in: sweep lr=1e-3..3e-2:log; {FORMS}")
    return space


def _range(name: str, values: str, config: TrainConfig) -> BaseDistribution:
    bounds, _, scale = values.partition(":")
    if scale not in ("", "log"):
        raise UserError(f"{name}={values}: {scale!r} is not a scale; {FORMS}")
    try:
        low, high = map(float, bounds.split(".."))
    except ValueError:
        raise UserError(f"{name}={values} is not a range of two numbers; {FORMS}") from None
    if low >= high:
        raise UserError(f"{name}={values} is empty; the first number must be below the second")
    if scale == "log" and low <= 0:
        raise UserError(f"{name}={values}: a logarithmic range must begin above 0")
    for bound in bounds.split(".."):
        _check(name, bound, config)
    if _is_whole(name, config):
        return IntDistribution(int(low), int(high), log=scale == "log")
    return FloatDistribution(low, high, log=scale == "log")


def _choices(name: str, values: str, config: TrainConfig) -> CategoricalDistribution:
    choices = values.split(",")
    for value in choices:
        _check(name, value, config)
    if len(set(choices)) < 2:
        raise UserError(
            f"{name}={values} leaves nothing to choose; give two values, or the flag --{name.replace('_', '-')}"
        )
    return CategoricalDistribution([_value(name, value) for value in choices])


def _value(name: str, text: str) -> Any:
    """Return a value as a file of settings holds it."""
    return {"True": True, "False": False, "None": None}.get(text, text)


def _check(name: str, value: str, config: TrainConfig) -> None:
    override(config, {name: _value(name, value)}, f"{name}={value}")


def _is_whole(name: str, config: TrainConfig) -> bool:
    return _accepts(name, 2.0, config) and not _accepts(name, 1.5, config)


def _accepts(name: str, value: float, config: TrainConfig) -> bool:
    try:
        override(config, {name: value}, name)
    except UserError:
        return False
    return True

"""Reading a verb's arguments; the only module that knows the parser, tyro."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fastvit_train.cli.flags import given, is_required
from fastvit_train.cli.messages import explain, missing_value
from fastvit_train.cli.training_verbs import Settings
from fastvit_train.config import settings_file
from fastvit_train.config.init_from import with_model_of
from fastvit_train.config.overrides import override, with_underscores
from fastvit_train.config.recipes import DEFAULT_RECIPE, recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import FLAGS
from fastvit_train.utils.errors import UserError

START = {"--init-from": "init_from", "--weights": "weights"}
"""the flags that name what a run starts from, and their settings"""
CHANNELS = "--in-chans"
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs)
Command = TypeVar("Command")


def parse(
    verb: str,
    takes: type[Command],
    args: Sequence[str],
    *,
    program: str = "fastvit",
    verbs: Sequence[str] = (),
    console_outputs: bool = True,
) -> Command:
    """Read the arguments of a verb.

    Args:
        takes: the verb's dataclass.
        args: the arguments after the verb.
        program: what the user typed before the verb, for the help.
        verbs: the names of all verbs, for error messages.
        console_outputs: False on the ranks that must not print help.

    Raises:
        UserError: if an argument is unknown, missing or has a value that is not allowed.
        SystemExit: with status 0, after --help.
    """
    defaults: dict[str, Any] = {}
    if issubclass(takes, Settings):
        args = _with_fit_memory(args)
        config, source = base_config(args)
        required = {field.name: tyro.MISSING for field in fields(takes) if is_required(field)}
        defaults["default"] = takes(
            config=source, run=config.run, model=config.model, data=config.data, optim=config.optim, **required
        )
    try:
        with contextlib.redirect_stderr(io.StringIO()), _respect_no_color():
            return tyro.cli(
                takes,
                args=list(args),
                prog=f"{program} {verb}",
                config=CONFIG,
                console_outputs=console_outputs,
                **defaults,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(explain(args, verb, takes, verbs)) from None


def base_config(args: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """Return the configuration that the flags override, and the path of the --config file.

    The recipe is the one that --recipe names, or else the one that the file names, or else `quickstart`. The file
    overrides the recipe, and the model of --init-from overrides both.

    Raises:
        UserError: if one of these flags has no value, if the recipe is unknown, or if the file or the run can't be
            read.
    """
    values: dict[str, str | None] = dict.fromkeys(("--recipe", "--config", CHANNELS, *START))
    for flag, words in given(args, Settings):
        if flag is not None and flag.name in values:
            if not words:
                raise UserError(missing_value(flag))
            values[flag.name] = words[0]
    path = values["--config"]
    settings = _read_config(Path(path)) if path else {}
    name = settings.get("recipe", DEFAULT_RECIPE) if values["--recipe"] is None else values["--recipe"]
    base = recipe(str(name))
    start = {key: values[flag] for flag, key in START.items() if values[flag] not in (None, "None")}
    if values[CHANNELS] in ("1", "3"):  # decides between the means and deviations of gray and of colored images
        start["in_chans"] = values[CHANNELS]
    if "init_from" in start:
        settings = {**with_underscores(settings), **with_model_of(start)}
    else:
        others = {key: value for key, value in settings.items() if key.replace("-", "_") not in start}
        settings = with_model_of({**others, **start})
    return override(base, {**settings, "recipe": base.run.recipe}, path or FLAGS), path


def _with_fit_memory(args: Sequence[str]) -> list[str]:
    """Write `--batch-size auto` as --fit-memory, as `override` does with the setting."""
    rest, written = list(args), []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--batch-size" and "auto" in (value, *([] if equals else rest[:1])):
            rest = rest if equals else rest[1:]
            word = "--fit-memory"
        written.append(word)
    return written


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return settings_file.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from None


@contextlib.contextmanager
def _respect_no_color() -> Iterator[None]:
    """Turn tyro's colours off under NO_COLOR (https://no-color.org), by presenting a dumb terminal."""
    before = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ.pop("TERM", None)
        if before is not None:
            os.environ["TERM"] = before

"""The command line: the only file that knows the parser."""

import argparse
import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fastvit_train.cli import messages
from fastvit_train.cli.overview import overview
from fastvit_train.cli.verbs import SCRIPT, VERBS, Settings
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env
from fastvit_train.training.preemption import EXIT_STATUS, Preempted
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, did_you_mean
from fastvit_train.utils.safe_load import read_settings

PROG = "fastvit_train"
TOLD = ("-h", "--help", "help", "--version")
"""instead of a verb"""
Command = TypeVar("Command")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; `train` where none is named.

    A user's mistake is one line on stderr and exit status 2; a run that was told to stop ends with 75.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # What compiles would begin on a CPU machine with a warning about a CUDA that it found no runtime of.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    verb = args.pop(0) if args and (not args[0].startswith("-") or args[0] in TOLD) else "train"
    try:
        if verb in TOLD:
            if env.is_rank0():
                _tell(verb)
            return
        if any("\0" in arg for arg in args):
            raise UserError("an argument holds a null byte, which no name has")
        if "" in args:
            raise UserError("an argument is empty; leave it out, or see whether a variable in it is set")
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; allowed: {', '.join(VERBS)}")
        takes, do = VERBS[verb]
        status = do(_parse(verb, takes, args))
        sys.stdout.flush()
        if status:
            sys.exit(status)
    except UserError as error:
        if not error.on_all_ranks or env.is_rank0():
            _complain(str(error))
        sys.exit(2)
    except Preempted as stopped:
        if env.is_rank0():
            _complain(str(stopped), "stopped")
        sys.exit(EXIT_STATUS)
    except BrokenPipeError:  # what read the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at its end
        sys.exit(141)
    except KeyboardInterrupt:
        if env.is_rank0():
            _complain("interrupted" + ("; --resume auto goes on from the last checkpoint" if verb == "train" else ""))
        sys.exit(130)


def _open_streams() -> None:
    """Have all three standard streams, closed ones too, and show what their encoding lacks in escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _tell(what: str) -> None:
    if what == "--version":
        print(f"{PROG} {metadata.version('fastvit-train')}")
    else:
        Terminal().print(overview(_program(), {name: takes for name, (takes, _) in VERBS.items()}))


def _complain(message: str, kind: str = "error") -> None:
    print(f"{PROG}: {kind}: {message}", file=sys.stderr)
    if env.under_launcher():
        print(
            "(what follows is the launcher's own traceback; `python -m fastvit_train` doesn't add one)",
            file=sys.stderr,
        )


def _program() -> str:
    """The program as it was called."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else f"python -m {PROG}"


def _base_config(args: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """What the flags override: the recipe, and over it the --config file, which may name the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise UserError(messages.missing_value(str(error.argument_name), Settings)) from None
    settings = _read_config(Path(known.config)) if known.config else {}
    name = settings.get("recipe", "quickstart") if known.recipe is None else known.recipe
    base = recipe(str(name))
    return override(base, {**settings, "recipe": base.run.recipe}, str(known.config)), known.config


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_settings(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from None


def _parse(verb: str, takes: type[Command], args: Sequence[str]) -> Command:
    """tyro's reading of `args`; its boxed complaints become one line."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {}
    if issubclass(takes, Settings):
        base, source = _base_config(args)
        extra["default"] = takes(config=source, run=base.run, model=base.model, data=base.data, optim=base.optim)
    try:
        with contextlib.redirect_stderr(complaint), _colours_as_wanted():
            return tyro.cli(
                takes,
                args=list(args),
                prog=f"{_program()} {verb}",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs),
                console_outputs=env.is_rank0(),
                **extra,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue(), verb, takes, args)) from None


@contextlib.contextmanager
def _colours_as_wanted() -> Iterator[None]:
    """tyro knows dumb terminals, but not NO_COLOR (https://no-color.org)."""
    before = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ.pop("TERM", None)
        if before is not None:
            os.environ["TERM"] = before


def _one_line(box: str, verb: str, takes: type[Any], args: Sequence[str]) -> str:
    """What tyro complains of, in our words."""
    text = _first_paragraph(box)
    if unknown := messages.unknown_flag(args, verb, takes):
        return unknown
    if match := re.match(r"Missing value for argument '(--[^']+)'", text):
        return messages.missing_value(match[1], takes)
    if text.startswith("Missing"):
        return messages.missing_argument(verb, takes)
    if match := re.match(r"invalid choice '(.*)' for argument '(\S+)'", text):
        return messages.wrong_value(match[2], match[1], takes)
    if match := re.match(r"Error parsing (--[^\s:]+)", text):
        return messages.wrong_value(match[1], messages.value_of(match[1], args), takes)
    if match := re.match(r"Unrecognized options: ([^,]+)", text):
        return messages.unknown_argument(match[1], args, list(VERBS), verb, takes)
    return f"{text or 'the arguments cannot be read'}; see {verb} --help"


def _first_paragraph(box: str) -> str:
    """What stands in tyro's box up to its first rule."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    rows = [line.strip("│ ") for line in lines if line.strip() and line[0] not in "╭╰"]
    if len(rows) > 1 and not rows[1].strip("-"):  # without UTF-8 there is no frame, but a title and a rule
        rows = rows[2:]
    rules = [i for i, row in enumerate(rows) if not row.strip("─-")]
    return " ".join(rows[: rules[0] if rules else None])

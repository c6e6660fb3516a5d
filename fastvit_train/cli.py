"""The command line: the only file that knows the parser."""

import argparse
import contextlib
import io
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fastvit_train import launch
from fastvit_train.commands import VERBS, Settings
from fastvit_train.config import TrainConfig, override
from fastvit_train.errors import UserError
from fastvit_train.preemption import EXIT_STATUS, Preempted
from fastvit_train.reading import read_settings
from fastvit_train.recipes import recipe

PROG = "fastvit_train"
Command = TypeVar("Command")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; `train` where none is named.

    A user's mistake is one line on stderr and exit status 2; a run that was told to stop ends with 75.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # What compiles would begin on a CPU machine with a warning about a CUDA that it found no runtime of.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    args = list(sys.argv[1:] if argv is None else argv)
    verb = args.pop(0) if args and not args[0].startswith("-") else "train"
    try:
        if any("\0" in arg for arg in args):
            raise UserError("an argument holds a null byte, which no name has")
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}; allowed: {', '.join(VERBS)}")
        takes, do = VERBS[verb]
        if status := do(_parse(takes, args)):
            sys.exit(status)
    except UserError as error:
        if not error.everywhere or launch.is_first_process():
            _complain(str(error))
        sys.exit(2)
    except Preempted as stopped:
        if launch.is_first_process():
            _complain(str(stopped), "stopped")
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        if launch.is_first_process():
            _complain("interrupted; --resume auto goes on from the last checkpoint")
        sys.exit(130)


def _complain(message: str, kind: str = "error") -> None:
    print(f"{PROG}: {kind}: {message}", file=sys.stderr)
    if launch.under_launcher():
        print(
            "(what follows is the launcher's own traceback; `python -m fastvit_train` doesn't add one)",
            file=sys.stderr,
        )


def _base_config(args: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """What the flags override: the recipe, and over it the --config file, which may name the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    settings = _read_config(Path(known.config)) if known.config else {}
    name = settings.get("recipe", "quickstart") if known.recipe is None else known.recipe
    base = recipe(str(name))
    return override(base, {**settings, "recipe": name}, str(known.config)), known.config


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_settings(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from None


def _parse(takes: type[Command], args: Sequence[str]) -> Command:
    """tyro's reading of `args`; its boxed complaints become one line."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {}
    if issubclass(takes, Settings):
        base, source = _base_config(args)
        extra["default"] = takes(config=source, run=base.run, model=base.model, data=base.data, optim=base.optim)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                takes,
                args=list(args),
                prog=f"python -m {PROG}",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs),
                **extra,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """The first paragraph of tyro's box; for an unknown flag, the known ones that it finds near."""
    rows = [line.strip("│ ") for line in box.splitlines() if line.strip() and line[0] not in "╭╰"]
    if len(rows) > 1 and not rows[1].strip("-"):  # without UTF-8 there is no frame, but a title and a rule
        rows = rows[2:]
    rules = [i for i, row in enumerate(rows) if not row.strip("─-")]
    text = " ".join(rows[: rules[0] if rules else None])
    if match := re.match(r"Error parsing (--\S+): .*?('.*')", text):
        flag, value = match.groups()
        wanted = next((row.removeprefix(flag).strip() for row in rows if row.startswith(f"{flag} ")), "see --help")
        return f"{flag} {value} is not allowed; allowed: {wanted}"
    if "nrecognized" not in text:
        return re.sub(r"\s+\.$", ".", text) or "the arguments can't be read; see --help"
    unknown = text.partition(": ")[2].partition(",")[0]
    close = [row.split()[0] for row in rows if re.match("--[a-z]", row)]
    hint = f"did you mean {' or '.join(close)}?" if close else "see --help for the allowed ones"
    return f"unknown {'flag' if unknown.startswith('-') else 'argument'} {unknown}; {hint}"

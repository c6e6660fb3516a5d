"""The command line: the only file that knows the parser."""

import argparse
import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from fastvit_train import launch, plots, report
from fastvit_train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, override
from fastvit_train.errors import UserError
from fastvit_train.plan import PlanOptions
from fastvit_train.planning import plan_run
from fastvit_train.preemption import EXIT_STATUS, Preempted
from fastvit_train.profiling import profile_run
from fastvit_train.reading import read_settings
from fastvit_train.recipes import recipe
from fastvit_train.repeat import fit_seeds
from fastvit_train.saved import evaluate_run
from fastvit_train.train import fit

PROG = "fastvit_train"
Command = TypeVar("Command")


@dataclass(frozen=True)
class TrainCommand:
    """Train a small Vision Transformer from scratch.

    Recipe < --config < flags. The resolved settings are saved with the run as config.yaml.
    Other verbs: profile, plan, eval RUN, compare RUN [RUN...]; each has its own --help.
    """

    config: str | None = None
    """YAML file of settings, named as the flags are"""
    resume: Literal["never", "auto", "must"] = "never"
    """go on from the run's last checkpoint: auto if there is one, must insists"""
    overwrite: bool = False
    """start over where the folder holds a run already"""
    repeat: int = 1
    """train with so many seeds, one after the other, and tell mean and spread"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class ProfileCommand:
    """Where a training step's time goes, and what to change first; takes the flags of a training."""

    config: str | None = None
    """YAML file of settings, named as the flags are"""
    steps: int = 20
    """to measure at a time"""
    output: Path = Path("profile")
    """folder for the trace and the figures"""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class PlanCommand:
    """Memory, communication and speed against the number of processes; takes the flags of a training on one."""

    config: str | None = None
    """YAML file of settings, named as the flags are"""
    plan: PlanOptions = field(default_factory=PlanOptions)
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a run's final weights."""

    run: Annotated[Path, tyro.conf.Positional]
    """a run's folder"""
    attention: str | None = None
    """how attention is computed; the run's own by default"""
    data_dir: str | None = None
    """where the data lies, if no longer where the run found it"""


@dataclass(frozen=True)
class CompareCommand:
    """Put runs side by side: a table, and their curves in one picture."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    output: Path = Path("curves.png")
    """where the picture goes"""
    markdown: bool = False
    """print the table as Markdown"""


def train(args: Sequence[str]) -> None:
    base, source = _base_config(args)
    default = TrainCommand(config=source, run=base.run, model=base.model, data=base.data, optim=base.optim)
    command = _parse(TrainCommand, args, default=default)
    config = TrainConfig(command.run, command.model, command.data, command.optim)
    if command.repeat == 1:
        fit(config, resume=command.resume, overwrite=command.overwrite)
    else:
        fit_seeds(config, command.repeat, resume=command.resume, overwrite=command.overwrite)
    launch.part()


def profile(args: Sequence[str]) -> None:
    base, source = _base_config(args)
    default = ProfileCommand(config=source, run=base.run, model=base.model, data=base.data, optim=base.optim)
    command = _parse(ProfileCommand, args, default=default)
    if command.steps < 1:
        raise UserError(f"--steps {command.steps} is out of range; allowed: 1 or more")
    config = TrainConfig(command.run, command.model, command.data, command.optim)
    profile_run(config, command.steps, command.output)


def plan(args: Sequence[str]) -> None:
    base, source = _base_config(args)
    default = PlanCommand(config=source, run=base.run, model=base.model, data=base.data, optim=base.optim)
    command = _parse(PlanCommand, args, default=default)
    plan_run(TrainConfig(command.run, command.model, command.data, command.optim), command.plan)


def evaluate(args: Sequence[str]) -> None:
    command = _parse(EvalCommand, args)
    evaluate_run(command.run, attention=command.attention, data_dir=command.data_dir)


def compare(args: Sequence[str]) -> None:
    command = _parse(CompareCommand, args)
    runs = list(command.runs)
    if not runs:
        raise UserError("compare takes the folders of one or more runs, as in: compare runs/a runs/b")
    if command.markdown:
        print(report.markdown(runs))
    else:
        Console().print(report.table(runs))
    plots.plot_curves(runs, command.output, report.datasets(runs))
    print(f"written to {command.output}")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "profile": profile,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; `train` where none is named.

    A user's mistake is one line on stderr and exit status 2; a run that was told to stop ends with 75.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = list(sys.argv[1:] if argv is None else argv)
    verb = args.pop(0) if args and not args[0].startswith("-") else "train"
    try:
        if any("\0" in arg for arg in args):
            raise UserError("an argument holds a null byte, which no name has")
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}; allowed: {', '.join(VERBS)}")
        VERBS[verb](args)
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


def _parse(command: type[Command], args: Sequence[str], default: Command | None = None) -> Command:
    """tyro's reading of `args`; its boxed complaints become one line."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command,
                args=list(args),
                prog=f"python -m {PROG}",
                config=(tyro.conf.OmitArgPrefixes,),
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

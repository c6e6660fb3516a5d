"""A run's folder and what is written into it: configuration, log, metrics, summary."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from fastvit_train import checkpoint
from fastvit_train.config import TrainConfig, differences, flatten
from fastvit_train.errors import UserError

Resume = Literal["never", "auto", "must"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, and how they are written; only rank 0 writes."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def steps(self) -> Path:
        return self.root / "steps.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def check(self, config: TrainConfig, resume: Resume, overwrite: bool) -> bool:
        """True where the run is to be resumed, False where it is to be started; nothing is written.

        Raises:
            UserError: where the folder's content forbids what is asked for.
        """
        if overwrite and resume != "never":
            raise UserError(f"--overwrite starts over, --resume {resume} goes on; give one of them")
        holds_run = self.config.is_file()
        if not holds_run and self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UserError(f"{self.root} exists and holds no run; choose another --exp-name or --runs-dir")
        has_checkpoint = checkpoint.exists(self.checkpoints)
        if resume == "must" and not has_checkpoint:
            raise UserError(f"--resume must: {self.root} has no checkpoint to resume from; leave --resume out to start")
        if resume != "never" and has_checkpoint:
            changed = differences(self.read_config(), plain(config))
            if changed:
                raise UserError(
                    f"{self.root} was started with another configuration ({'; '.join(changed)}); "
                    "give the same settings, or another --exp-name"
                )
            return True
        if resume == "auto" and any(path.exists() for path in (self.metrics, self.checkpoints)):
            raise UserError(f"{self.root} holds a run without a checkpoint to go on from; --overwrite starts it over")
        if holds_run and not overwrite and resume == "never":
            raise UserError(
                f"{self.root} holds a run already; give --resume auto to go on with it, --overwrite to start it over, "
                "or another --exp-name"
            )
        return False

    def read_config(self) -> dict[str, Any]:
        """The run's settings, flat; UserError where there are none to be read."""
        try:
            settings = yaml.safe_load(self.config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.root} is no run: its config.yaml can't be read ({error})") from None
        if not isinstance(settings, dict):
            raise UserError(f"{self.root} is no run: its config.yaml holds no settings")
        return settings

    def with_recorded_attention(self, config: TrainConfig) -> TrainConfig:
        """`config` with the attention that the run here was started with."""
        recorded = self.read_config().get("attention", config.model.attention)
        return replace(config, model=replace(config.model, attention=recorded))

    def create(self, config: TrainConfig) -> None:
        """Make the folder, emptied of an earlier run, with its config.yaml; UserError where it can't be written."""
        try:
            if self.root.exists():
                shutil.rmtree(self.root.resolve())
            self.root.resolve().mkdir(parents=True)
            write_atomically(self.config, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"can't write {self.root} ({error.strerror or error}); choose another --runs-dir") from None

    def remove_unless_resumable(self) -> None:
        """Leave nothing of a run that failed before its first checkpoint."""
        if not checkpoint.exists(self.checkpoints):
            shutil.rmtree(self.root.resolve(), ignore_errors=True)

    def keep_until(self, epoch: int, step: int) -> None:
        """Drop metrics after a checkpoint's `epoch` and `step`, which the resumed run will write again."""
        for path, key, last in ((self.metrics, "epoch", epoch), (self.steps, "step", step)):
            kept = [row for row in read_rows(path) if row[key] <= last]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines of JSON to metrics or steps."""
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=2) + "\n")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML holds it: flat, lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


class Log:
    """Plain lines in the terminal and, from `attach` on, in a file; silent on all ranks but 0."""

    def __init__(self, speaks: bool) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self._speaks = speaks
        self._path: Path | None = None

    def attach(self, path: Path) -> None:
        self._path = path

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)
        if self._speaks and self._path is not None:
            with self._path.open("a") as file:
                file.write(text + "\n")

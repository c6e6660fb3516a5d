"""A run's folder and what is written into it: configuration, log, metrics, summary."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fastvit_train.config.overrides import differences, to_plain
from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs import checkpoint, lock
from fastvit_train.runs.train_state import TrainState
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_settings

ResumeMode = Literal["never", "auto", "must"]


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
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def should_resume(self, config: TrainConfig, resume: ResumeMode, overwrite: bool) -> bool:
        """True where the run is to be resumed, False where it is to be started; nothing is written.

        Raises:
            UserError: where the folder's content forbids what is asked for.
        """
        if overwrite and resume != "never":
            raise UserError(f"--overwrite starts over, --resume {resume} goes on; give one of them")
        holds_run = self.config.is_file()
        if not holds_run and self.root.exists() and not self._is_ours():
            raise UserError(f"{self.root} exists and holds no run; choose another --exp-name or --runs-dir")
        has_checkpoint = checkpoint.exists(self.checkpoints)
        if resume == "must" and not has_checkpoint:
            raise UserError(f"--resume must: {self.root} has no checkpoint to resume from; leave --resume out to start")
        if resume != "never" and has_checkpoint:
            changed = differences(self.read_config(), to_plain(config))
            if changed:
                raise UserError(
                    f"{self.root} was started with another configuration ({'; '.join(changed)}); "
                    "give the same settings, or another --exp-name"
                )
            return True
        if resume == "auto" and self.summary.exists():
            raise UserError(f"{self.root} holds a run without a checkpoint to go on from; --overwrite starts it over")
        if holds_run and not overwrite and resume == "never":
            raise UserError(
                f"{self.root} holds a run already; give --resume auto to go on with it, --overwrite to start it over, "
                "or another --exp-name"
            )
        return False

    def _is_ours(self) -> bool:
        """True for a folder that holds nothing but what a start leaves that was killed before config.yaml was there."""
        return self.root.is_dir() and all(
            path.name in lock.FILES or path.name.endswith(".partial") for path in self.root.iterdir()
        )

    def read_config(self) -> dict[str, Any]:
        """The run's settings, flat; UserError where there are none to be read."""
        try:
            if not self.config.is_file():
                raise ValueError("there is none")
            settings = read_settings(self.config)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.root} is no run: its config.yaml can't be read ({error})") from None
        if not settings:
            raise UserError(f"{self.root} is no run: its config.yaml holds no settings")
        return settings

    def recorded_attention(self, default: str) -> str:
        """Return the attention that the run here was started with, or `default` if it recorded none."""
        return str(self.read_config().get("attention", default))

    def create(self, config: TrainConfig) -> None:
        """Empty the folder of an earlier run and write config.yaml; UserError where it can't be written.

        Whenever it is killed, what is left is a run's folder with all of its checkpoints or none.
        """
        with self._writing():
            self.summary.unlink(missing_ok=True)
            if self.checkpoints.exists():
                self.checkpoints.rename(self.root / f".old-{os.getpid()}")
            for path in self.root.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in lock.FILES and path != self.config:
                    path.unlink()
            atomic_io.write_atomically(self.config, config_to_yaml(config))

    def acquire_lock(self) -> tuple[lock.RunLock, list[str]]:
        """The folder's lock, taken, and what is to be said of it.

        Raises:
            UserError: where another process holds it, or the folder can't be written.
        """
        held = lock.RunLock(self.root)
        with self._writing():
            return held, held.acquire()

    def remove_unless_resumable(self) -> None:
        """Leave nothing of a run that failed before its first checkpoint."""
        if not checkpoint.exists(self.checkpoints):
            shutil.rmtree(self.root.resolve(), ignore_errors=True)

    def drop_after(self, state: TrainState) -> None:
        """Drop metrics and checkpoints after `state`, which the resumed run will write again."""
        first_step = state.step - state.step_in_epoch
        with self._writing():
            for path, key, last in ((self.metrics, "epoch", state.epoch), (self.steps, "step", first_step)):
                kept = [row for row in read_jsonl(path) if isinstance(row.get(key), int) and row[key] <= last]
                atomic_io.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
            checkpoint.drop_after(self.checkpoints, state)
            for leftover in self.root.glob(".*.partial"):
                leftover.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"can't write {self.root} ({error.strerror or error}); choose another --runs-dir") from None


def config_to_yaml(config: TrainConfig) -> str:
    """The configuration as config.yaml holds it and --config takes it."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file but those that are none: a kill may have cut one short."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows

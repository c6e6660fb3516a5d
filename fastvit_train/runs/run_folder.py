"""The folder of a run: its files, whether the run in it can be resumed, and its configuration."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastvit_train.config import settings_file, windows
from fastvit_train.config.overrides import differences, override, to_plain
from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs import checkpoint, lock
from fastvit_train.runs.train_state import TrainState
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError

ResumeMode = Literal["never", "auto", "must"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files and the changes to its folder; only rank 0 writes."""

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
    def evaluation(self) -> Path:
        return self.root / "eval" / "evaluation.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def should_resume(self, config: TrainConfig, resume: ResumeMode, overwrite: bool) -> bool:
        """Return whether the run is to be resumed (True) or started (False); nothing is written.

        Raises:
            UserError: if the folder's content does not allow what is asked for.
        """
        if overwrite and resume != "never":
            raise UserError(f"--overwrite starts over and --resume {resume} continues; give only one of them")
        self._check_path()
        holds_run = self.config.is_file()
        if not holds_run and self.root.exists() and not self.is_unused():
            raise UserError(
                f"{self.root} exists and holds files that do not belong to a run; "
                "choose another --exp-name or --runs-dir"
            )
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
            raise UserError(f"{self.root} holds a run without a checkpoint; start it over with --overwrite")
        if holds_run and not overwrite and resume == "never":
            raise UserError(
                f"{self.root} already holds a run; give --resume auto to continue it, --overwrite to start it over, "
                "or another --exp-name"
            )
        return False

    def is_unused(self) -> bool:
        """Return whether the folder holds at most the files of a run that was killed before it wrote config.yaml."""
        try:
            return all(path.name in lock.FILES or path.name.endswith(".partial") for path in self.root.iterdir())
        except OSError:  # it is not a folder, or cannot be read
            return False

    def _check_path(self) -> None:
        try:
            os.fsencode(self.root.absolute()).decode("utf-8")
        except UnicodeError:
            raise UserError(
                f"the path {self.root} is not UTF-8, and the weights could not be read again; "
                "choose another --exp-name or --runs-dir, such as one in plain ASCII"
            ) from None
        if sys.platform == "win32" and (reason := windows.why_refused(self.root.absolute())):
            raise UserError(f"{reason}; choose another --exp-name or --runs-dir")

    def read_config(self) -> dict[str, Any]:
        """Read the run's settings, by name; those that config.yaml does not hold have their defaults.

        Raises:
            UserError: if it cannot be read or is empty, or if a newer version wrote something that this one does not
                know.
        """
        try:
            if not self.config.is_file():
                raise ValueError("there is no such file")
            settings = settings_file.read(self.config)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.root} is not a run: its config.yaml can't be read ({error})") from None
        if not settings:
            raise UserError(f"{self.root} is not a run: its config.yaml holds no settings")
        defaults = to_plain(TrainConfig()).items()
        return {**{key: value for key, value in defaults if key.replace("_", "-") not in settings}, **settings}

    def recorded_implementations(self) -> dict[str, str]:
        """Return the attention and the block that the run here was started with."""
        config = self.read_config()
        return {name: str(config[name]) for name in ("attention", "block")}

    def recorded_batches(self) -> tuple[int, int] | None:
        """Return the micro-batches and the evaluation's batch size of the run here; None if it cannot be resumed."""
        if not checkpoint.exists(self.checkpoints):
            return None
        saved = override(TrainConfig(), self.read_config(), str(self.config))
        return saved.optim.grad_accum, saved.run.eval_batch_size

    def create(self, config: TrainConfig) -> None:
        """Remove an earlier run from the folder and write config.yaml; UserError if it cannot be written.

        Even if the process is killed in between, the folder holds all checkpoints of the earlier run, or none.
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
            atomic_io.write_atomically(self.config, settings_file.to_file(config))

    def record_extension(self, config: TrainConfig, state: TrainState) -> None:
        """Write into config.yaml for how many more epochs a finished run is trained; nothing if it has not changed.

        Raises:
            UserError: if the run is not finished, or was extended by other numbers of epochs.
        """
        saved = override(TrainConfig(), self.read_config(), str(self.config))
        before, extend = saved.run.extend, config.run.extend
        if extend == before:
            return
        if extend[: len(before)] != before:
            already = " ".join(map(str, before))
            raise UserError(f"{self.root} was extended with --extend {already}; repeat these numbers before any others")
        if state.epoch < saved.run.total_epochs:
            raise UserError(
                f"{self.root} has trained {state.epoch} of its {saved.run.total_epochs} epochs; finish it before "
                "--extend, with --resume must"
            )
        with self._writing():
            extended = replace(saved, run=replace(saved.run, extend=extend))
            atomic_io.write_atomically(self.config, settings_file.to_file(extended))

    def acquire_lock(self) -> tuple[lock.RunLock, list[str]]:
        """Acquire the folder's lock; returns it and messages about a lock that a dead process left.

        Raises:
            UserError: if another process holds the lock, or if the folder cannot be written.
        """
        held = lock.RunLock(self.root)
        with self._writing():
            return held, held.acquire()

    def remove_unless_resumable(self) -> None:
        """Remove the folder of a run that failed before its first checkpoint."""
        if not checkpoint.exists(self.checkpoints):
            shutil.rmtree(self.root.resolve(), ignore_errors=True)

    def drop_after(self, state: TrainState, keep: int) -> None:
        """Remove the metrics and checkpoints after `state`: the resumed run writes them again."""
        first_step = state.step - state.step_in_epoch
        with self._writing():
            for path, key, last in ((self.metrics, "epoch", state.epoch), (self.steps, "step", first_step)):
                kept = [row for row in read_jsonl(path) if isinstance(row.get(key), int) and row[key] <= last]
                atomic_io.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
            checkpoint.drop_after(self.checkpoints, state, keep)
            for leftover in self.root.glob(".*.partial"):
                leftover.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "free disk space, or " if error.errno in atomic_io.DISK_IS_FULL else ""
            raise UserError(
                f"can't write {self.root} ({error.strerror or error}); {remedy}choose another --runs-dir"
            ) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a .jsonl file; lines that are not valid are left out: a kill may have cut one short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows

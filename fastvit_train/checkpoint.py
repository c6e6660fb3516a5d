"""Checkpoints at optimizer-step boundaries: written beside and renamed into place, checked when they come back."""

import hashlib
import json
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.scheduler.scheduler import Scheduler

from fastvit_train.errors import UserError
from fastvit_train.telemetry import Usage

PROGRESS_FILE = "progress.json"
DAMAGED = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass
class Progress:
    """How far a run has come; together with the configuration all that the data order needs."""

    epoch: int = 0
    """epochs completed"""
    step_in_epoch: int = 0
    """optimizer steps done of the epoch under way"""
    step: int = 0
    """optimizer steps done in all"""
    train_seconds: float = 0.0
    """spent training in the completed epochs"""
    eval_seconds: float = 0.0
    """spent evaluating after the completed epochs"""
    epochs_to_target: int | None = None
    """completed when an evaluation first reached the target accuracy"""
    seconds_to_target: float | None = None
    """spent training and evaluating until then"""
    best_accuracy: float = -1.0
    best_step: int = -1
    epoch_losses: list[float] = field(default_factory=list)
    """loss of each step of the epoch under way, mean over all processes"""
    epoch_correct: float = 0.0
    """training samples classified right in the epoch under way, over all processes"""
    epoch_seconds: float = 0.0
    """spent training in the epoch under way"""
    energy_joules: float | None = 0.0
    """that the GPUs took in `train_seconds`; None once it was not measured"""
    busy_seconds: float | None = 0.0
    """of `train_seconds` in which the GPUs had something to do, on average"""
    energy_unmeasured: str | None = None
    """why there is no energy"""
    epoch_joules: float | None = 0.0
    epoch_busy_seconds: float | None = 0.0

    def spend(self, usage: Usage) -> None:
        """Count what training took towards the epoch under way."""
        self.epoch_seconds += usage.seconds
        self.energy_unmeasured = self.energy_unmeasured or usage.unmeasured
        self.epoch_joules = _add(self.epoch_joules, usage.energy_joules)
        self.epoch_busy_seconds = _add(self.epoch_busy_seconds, usage.busy_seconds)

    def close_epoch(self) -> None:
        """Count the epoch under way as completed."""
        self.epoch += 1
        self.train_seconds += self.epoch_seconds
        self.energy_joules = _add(self.energy_joules, self.epoch_joules)
        self.busy_seconds = _add(self.busy_seconds, self.epoch_busy_seconds)
        self.step_in_epoch, self.epoch_losses, self.epoch_correct = 0, [], 0.0
        self.epoch_seconds, self.epoch_joules, self.epoch_busy_seconds = 0.0, 0.0, 0.0

    def evaluated(self, accuracy: float, seconds: float, target: float | None) -> bool:
        """Count an evaluation after the last completed epoch; True where it is the first to reach `target`."""
        self.eval_seconds += seconds
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, self.step
        if target is None or accuracy < target or self.epochs_to_target is not None:
            return False
        self.epochs_to_target, self.seconds_to_target = self.epoch, self.train_seconds + self.eval_seconds
        return True


def _add(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more


def save(
    folder: Path, accelerator: Accelerator, scheduler: Scheduler, progress: Progress, data: dict[str, object]
) -> None:
    """Write step_N below `folder`, point `last` (and `best`) to it, and drop checkpoints neither points to."""
    name = f"step_{progress.step}"
    partial, final = folder / f".{name}.partial", folder / name
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    fingerprints = accelerator.gather(_rng_fingerprint().to(accelerator.device)).tolist()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {
            "progress": asdict(progress),
            "learning_rates": _learning_rates(scheduler),
            "optimizer_steps": _optimizer_steps(scheduler),
            "rng": fingerprints,
            "mixed_precision": accelerator.mixed_precision,
            "data": data,
        }
        (partial / PROGRESS_FILE).write_text(json.dumps(state, indent=1))
        _replace_folder(partial, final)
        _point(folder / "last", name)
        if progress.best_step == progress.step:
            _point(folder / "best", name)
        _prune(folder)
    accelerator.wait_for_everyone()


def exists(folder: Path) -> bool:
    """True where there is a checkpoint to resume from."""
    return (folder / "last" / PROGRESS_FILE).is_file()


def load(folder: Path, accelerator: Accelerator, scheduler: Scheduler, data: dict[str, object]) -> Progress:
    """Restore `last` into everything that was prepared; returns how far it had come.

    Raises:
        UserError: where the checkpoint can't be read, or the data or the precision is another one now.
        RuntimeError: where random state, optimizer or schedule did not come back as they were saved.
    """
    path = (folder / "last").resolve()
    try:
        saved = json.loads((path / PROGRESS_FILE).read_text())
        progress = Progress(**saved["progress"])
        _check_same(path, saved, accelerator, data)
        accelerator.load_state(str(path))
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} can't be read ({reason}); start over with --overwrite") from None
    if len(saved["rng"]) == accelerator.num_processes and (
        int(_rng_fingerprint()) != saved["rng"][accelerator.process_index]
    ):
        raise RuntimeError(f"the random state in {path} did not come back")
    if _learning_rates(scheduler) != saved["learning_rates"]:
        raise RuntimeError(f"the learning rates in {path} did not come back")
    if _optimizer_steps(scheduler) != saved["optimizer_steps"]:
        raise RuntimeError(f"the optimizer in {path} did not come back")
    return progress


def _check_same(path: Path, saved: dict[str, Any], accelerator: Accelerator, data: dict[str, object]) -> None:
    changed = [f"{key}: {saved['data'][key]} -> {data[key]}" for key in data if saved["data"][key] != data[key]]
    if changed:
        raise UserError(
            f"{path} was trained on other data ({'; '.join(changed)}); "
            "bring the data back as it was, or start another run with --exp-name"
        )
    if saved["mixed_precision"] != accelerator.mixed_precision:
        before, now = saved["mixed_precision"], accelerator.mixed_precision
        raise UserError(
            f"{path} was trained with mixed precision {before!r}, this launch has {now!r}; "
            f"resume with accelerate launch --mixed_precision {before}"
        )


def _rng_fingerprint() -> torch.Tensor:
    """A 1-element int64 tensor that tells this process's torch random state, the GPU's included."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=7)
    if torch.cuda.is_available():
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return torch.tensor([int.from_bytes(digest.digest())])


def _learning_rates(scheduler: Scheduler) -> list[float]:
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _optimizer_steps(scheduler: Scheduler) -> list[float]:
    """The steps that the optimizer counts, fewer than the run's where fp16 skipped some."""
    return sorted({float(state["step"]) for state in scheduler.optimizer.state.values() if "step" in state})


def _replace_folder(source: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _point(link: Path, name: str) -> None:
    """Make `link` a symbolic link to its sibling `name`, atomically."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name, target_is_directory=True)
    fresh.replace(link)


def _prune(folder: Path) -> None:
    kept = {(folder / link).resolve() for link in ("last", "best")}
    for path in folder.glob("step_*"):
        if path.resolve() not in kept:
            shutil.rmtree(path)

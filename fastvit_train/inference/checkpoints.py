"""The checkpoints of a run whose weights can be used: by name, with the epoch that each is from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastvit_train.config.init_from import FINAL
from fastvit_train.runs.checkpoint import by_step
from fastvit_train.runs.results import BEST_OF, BEST_WEIGHTS, LAST_EPOCH, read_summary, score
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError

SHARDED = "pytorch_model_fsdp.bin"
"""the weights in a checkpoint of a launch with FSDP"""
BEST, LAST = "best", "last"


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a run saved, and when."""

    name: str
    """best, last, or the step"""
    path: Path
    """the file with the weights"""
    step: int
    """optimizer steps taken before it was saved"""
    epoch: int | None
    """epochs completed; None for a checkpoint within an epoch"""
    accuracy: float | None
    """on the run's evaluation images, a fraction; None if it was not evaluated"""

    def __str__(self) -> str:
        when = f"step {self.step}" if self.epoch is None else f"epoch {self.epoch} (step {self.step})"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%} during training"
        return f"checkpoint {self.name}: {when}{accuracy}"


def find_checkpoint(folder: Path, name: str, ema: bool, keep_best_of: str) -> Checkpoint:
    """Return a checkpoint of a run.

    Args:
        folder: the run's folder.
        name: `best`, the best epoch (the earliest of these if there are several); `last`, what was trained last; or a
            step, as in checkpoints/step_N.
        ema: whether the run evaluates a moving average of the weights.
        keep_best_of: what the best epoch has the highest value of, or the lowest if it is the loss; see `BEST_OF`.

    Raises:
        UserError: if there is no such checkpoint, listing those that exist, or if it is damaged.
    """
    found = {checkpoint.name: checkpoint for checkpoint in _list(folder, ema, keep_best_of)}
    if name not in found:
        listed = ", ".join(
            name + (f" (step {c.step})" if c.epoch is None else f" (epoch {c.epoch})") for name, c in found.items()
        )
        raise UserError(f"{folder} has no checkpoint {name!r}; it has: {listed or 'none'}")
    checkpoint = found[name]
    if checkpoint.path.parent != folder:
        damage = atomic_io.find_damage(checkpoint.path.parent)
        if damage is not None:
            raise UserError(f"{checkpoint.path.parent} is damaged ({damage}); choose another --checkpoint")
    return checkpoint


def _list(folder: Path, ema: bool, keep_best_of: str) -> list[Checkpoint]:
    """Return the best and the last checkpoint, if there are any, and all checkpoints by step."""
    rows = [row for row in read_jsonl(RunFolder(folder).metrics) if _is_epoch(row)]
    by_step = {row["step"]: row for row in rows}

    def describe(name: str, path: Path, step: int) -> Checkpoint:
        row = by_step.get(step, {})
        return Checkpoint(name, path, step, row.get("epoch"), row.get("test_accuracy"))

    steps = _saved_steps(folder, ema, rows)
    result = []
    best, written = _best_step(rows, keep_best_of), _read_step(folder / BEST_WEIGHTS)
    if best in steps and best != written:  # an earlier version wrote no such file, or the disk was full
        result.append(describe(BEST, steps[best], best))
    elif written is not None:
        result.append(describe(BEST, folder / BEST_WEIGHTS, written))
    final = _step_of_final_weights(folder)
    if final is not None and final >= max(steps, default=0):
        result.append(describe(LAST, folder / FINAL, final))
    elif steps:
        result.append(describe(LAST, steps[max(steps)], max(steps)))
    return result + [describe(str(step), steps[step], step) for step in sorted(steps)]


def _saved_steps(folder: Path, ema: bool, rows: list[dict[str, Any]]) -> dict[int, Path]:
    """Return the files with weights by step: of the checkpoints, and those of --save-model-every."""
    saved = {row["step"]: folder / f"model_epoch_{row['epoch']}.safetensors" for row in rows}
    for name in ("model_1.safetensors" if ema else "model.safetensors", SHARDED):
        paths = {step: path / name for step, path in by_step(RunFolder(folder).checkpoints).items()}
        saved.update({step: path for step, path in paths.items() if path.is_file()})
    return {step: path for step, path in saved.items() if path.is_file()}


def _is_epoch(row: dict[str, Any]) -> bool:
    counts = all(type(row.get(key)) is int for key in ("epoch", "step"))
    return counts and isinstance(row.get("test_accuracy"), float | int)


def _read_step(path: Path) -> int | None:
    """Return the step that the metadata of weights names; None if there is no such file, or if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _best_step(rows: list[dict[str, Any]], keep_best_of: str) -> int | None:
    """Return the last step of the best epoch; None if no epoch's value is known."""
    known = [row for row in rows if isinstance(row.get(BEST_OF[keep_best_of][0]), float | int)]
    return max(known, key=lambda row: score(row, keep_best_of))["step"] if known else None


def _step_of_final_weights(folder: Path) -> int | None:
    """Return the step after which the final weights are; None if they are not those of the last epoch of a run."""
    if not (folder / FINAL).is_file():
        return None
    try:
        summary = read_summary(folder)
    except UserError:
        return None
    steps = summary.get("steps")
    return steps if type(steps) is int and summary.get("final_weights", LAST_EPOCH) == LAST_EPOCH else None

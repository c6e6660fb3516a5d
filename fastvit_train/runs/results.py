"""The results and settings of a run, finished or not."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_train.config.overrides import override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.safe_load import read_json

TEXT_KEYS = ("model", "dataset", "evaluated_on", "recipe", "mixed_precision", "device")
MAX_TEXT_LENGTH = 200
INVALID = (KeyError, TypeError, ValueError, OverflowError)
"""errors that a value of the wrong type raises when it is formatted"""
LAST_EPOCH, BEST_EPOCH, AVERAGE = "last epoch", "best epoch", "average"
"""what the final weights of a run can be, as summary.json says"""
BEST_WEIGHTS = "best.safetensors"
"""the weights after the best epoch so far, in the run's folder; their metadata has the step"""
BEST_OF = {"accuracy": ("test_accuracy", 1), "balanced": ("balanced_test_accuracy", 1), "loss": ("test_loss", -1)}
"""for each value of --keep-best-of: a key of metrics.jsonl, and 1 if the highest value is best, -1 if the lowest is"""
RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")
"""a folder with one of these files is a run"""


@dataclass(frozen=True)
class RunResults:
    """The results and settings of a run."""

    name: str
    folder: Path
    results: dict[str, Any]
    """see `read_results`"""
    settings: dict[str, Any]
    """see `RunFolder.read_config`; empty if the folder has no config.yaml"""
    evaluation: dict[str, Any]
    """what `eval` wrote about the last weights; empty if it has not seen them"""

    @property
    def finished(self) -> bool:
        return is_finished(self.results)


def split_off_others(sources: Sequence[str], files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `sources` into those that may be runs, and existing files and folders that are none, as in `runs/*`.

    Args:
        sources: paths, or names of models elsewhere.
        files: a folder that has one of these files may be a run.
    """
    others = [
        source
        for source in sources
        if os.path.exists(source) and not any(os.path.exists(os.path.join(source, name)) for name in files)
    ]
    return [source for source in sources if source not in others], others


def read_runs(folders: Sequence[Path]) -> list[RunResults]:
    """Read the results and settings of runs.

    Raises:
        UserError: if one of them is not a run, or if a file of it is damaged.
    """
    names = distinct_names(folders)
    return [_read_run(RunFolder(folder), name) for folder, name in zip(folders, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the folders, or the paths of those whose names are the same."""
    names = [folder.resolve().name for folder in folders]
    pairs = zip(names, folders, strict=True)
    return [printable(name if names.count(name) == 1 else str(folder)) for name, folder in pairs]


def _read_run(folder: RunFolder, name: str) -> RunResults:
    results = read_results(folder.root)
    return RunResults(
        name,
        folder.root,
        results,
        folder.read_config() if os.path.exists(folder.config) else {},
        _read_evaluation(folder.evaluation, results),
    )


def read_results(run: Path) -> dict[str, Any]:
    """Return the results of a finished run as `read_summary` does, or those so far of a run that is not finished.

    Results so far have the keys of summary.json that config.yaml and metrics.jsonl give, and `planned_epochs`.

    Raises:
        UserError: if `run` is not the folder of a run, or if its files are damaged.
    """
    folder = RunFolder(run)
    if not os.path.exists(folder.summary) and os.path.exists(folder.config):
        return _results_so_far(folder)
    summary = read_summary(run)
    return _results_so_far(folder) if _was_resumed(folder, summary) else summary


def _was_resumed(folder: RunFolder, summary: dict[str, Any]) -> bool:
    """Return whether a run that had ended, at --stop-after for example, has trained further epochs since."""
    last = read_jsonl(folder.metrics)[-1]
    now, then = last.get("epoch"), summary.get("epochs")
    is_complete = "seconds" in last and os.path.exists(folder.config)
    return is_complete and type(now) is int and type(then) is int and now > then


def score(epoch: Mapping[str, Any], keep_best_of: str) -> float:
    """Return what the best epoch has most of.

    Args:
        epoch: a line of metrics.jsonl.
        keep_best_of: a key of `BEST_OF`.
    """
    key, sign = BEST_OF[keep_best_of]
    return sign * epoch[key]


def is_finished(results: dict[str, Any]) -> bool:
    """Return whether results of `read_results` are those of a finished run."""
    return "planned_epochs" not in results


def read_summary(run: Path) -> dict[str, Any]:
    """Return a finished run's summary.json with the train loss of its last epoch.

    Raises:
        UserError: if `run` is not the folder of a finished run.
    """
    try:
        summary = read_json(run / "summary.json")
        last_epoch = read_jsonl(RunFolder(run).metrics)[-1]
        return {
            "train_loss": last_epoch["train_loss"],
            **summary,
            **{key: _checked_text(summary[key]) for key in TEXT_KEYS},
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run} is not a finished run: its summary.json and metrics.jsonl cannot be read ({error!r}); "
            "give the folder of a finished run"
        ) from None


def _read_evaluation(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return what `eval` wrote, if the run has not been trained further since."""
    if not file.exists():
        return {}
    try:
        evaluation = read_json(file)
        is_current = evaluation.get("steps", results.get("steps")) == results.get("steps")
        counts = is_current and evaluation.get("tta", "none") == "none"  # accuracies with TTA are not comparable
        return {**evaluation, "dataset": _checked_text(evaluation["dataset"])} if counts else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); repeat `eval`, or remove that file") from None


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.100} is not a string")
    return printable(text[:MAX_TEXT_LENGTH])


def _results_so_far(folder: RunFolder) -> dict[str, Any]:
    settings, rows = folder.read_config(), read_jsonl(folder.metrics)
    results = {
        **{key: _checked_text(str(settings[key])) for key in ("model", "dataset", "recipe")},
        "evaluated_on": "holdout" if settings["holdout"] else "test",
        "epochs": 0,
        "planned_epochs": override(TrainConfig(), settings, str(folder.config)).run.total_epochs,
    }
    if not rows:
        return results
    shown = ("epoch", "step", "train_loss", "test_loss", "test_accuracy", "balanced_test_accuracy")
    last = {key: rows[-1].get(key) for key in shown}
    try:
        seconds = [float(row["seconds"]) for row in rows]
        images = sum(row["images_per_second"] * spent for row, spent in zip(rows, seconds, strict=True))
        return {
            **results,
            **last,
            "epochs": last["epoch"],
            "best_test_accuracy": max(row["test_accuracy"] for row in rows),
            "train_seconds": sum(seconds),
            "images_per_second": images / sum(seconds),
            "peak_memory_mib": max(row["peak_memory_mib"] for row in rows),
        }
    except (*INVALID, ZeroDivisionError) as error:
        raise UserError(
            f"{folder.metrics} is damaged ({error!r}); leave {folder.root} out until its next epoch ends"
        ) from None

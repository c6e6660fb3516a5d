"""What there is to report of a run: what it wrote, and what its model says of the test set now."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastvit_train.config.overrides import to_plain
from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.evaluate import EvaluatedRun, evaluate_run
from fastvit_train.inference.trained_model import FOLDER, TrainedModel, load_run
from fastvit_train.runs.comparison import read_summary
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils.errors import UserError, printable

Made = TypeVar("Made")


@dataclass(frozen=True)
class Record:
    """What there is of a run; what isn't is empty, and `missing` says why."""

    source: str
    """as it was asked for"""
    name: str
    folder: Path | None
    summary: dict[str, Any]
    """summary.json, or the little that the model itself tells"""
    epochs: list[dict[str, Any]]
    """the lines of metrics.jsonl"""
    settings: dict[str, Any]
    """config.yaml, flat, with the defaults of settings that it was written before"""
    evaluated: EvaluatedRun | None
    missing: tuple[str, ...]
    """a sentence for each thing that isn't there: which, and why"""
    not_evaluated: str
    """why `evaluated` is None, or nothing"""


def read_records(runs: Sequence[str], data_dir: str | None) -> list[Record]:
    """A record per run, each under a name of its own.

    Raises:
        UserError: where nothing at all is to be had of a run.
    """
    records = [_read_record(run, data_dir) for run in runs]
    names = [record.name for record in records]
    return [replace(r, name=printable(r.source)) if names.count(r.name) > 1 else r for r in records]


def attempt(make: Callable[[], Made]) -> tuple[Made | None, str]:
    """What `make` returns and nothing, or None and the line of its UserError."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def _read_record(run: str, data_dir: str | None) -> Record:
    path = Path(run.removeprefix(FOLDER))
    folder = RunFolder(path)
    if not folder.config.is_file():
        return _from_elsewhere(run, load_run(run))
    summary, no_summary = attempt(lambda: read_summary(path))
    settings, no_settings = attempt(lambda: {**to_plain(TrainConfig()), **folder.read_config()})
    epochs: list[dict[str, Any]] = []
    with suppress(OSError):  # then there are no curves
        epochs = read_jsonl(folder.metrics)
    loaded, not_evaluated = attempt(lambda: load_run(run, device="cpu"))
    evaluated = None
    if loaded is not None:
        # Computed plainly, which any machine can: a run trained on a GPU may be reported on a laptop.
        attention, summary = loaded.attention, summary or _told_by(loaded)
        evaluated, not_evaluated = attempt(lambda: evaluate_run(run, data_dir=data_dir, attention=attention))
    if not (summary or epochs):
        raise UserError(f"there is nothing to report of {run}: {no_summary}; {not_evaluated}")
    missing = {"No figures": no_summary, "No settings": no_settings}
    return Record(
        run,
        printable(path.resolve().name),
        path,
        summary or {},
        epochs,
        settings or {},
        evaluated,
        tuple(f"{what}: {why}" for what, why in missing.items() if why),
        f"No evaluation: {not_evaluated}" if not_evaluated else "",
    )


def _from_elsewhere(run: str, loaded: TrainedModel) -> Record:
    return Record(
        run, loaded.name, loaded.folder, _told_by(loaded), [], {}, None,
        ("No figures, curves, settings and commands: it is no folder that a training of ours left, so there is no "
         "config.yaml, metrics.jsonl and summary.json.",),
        f"No evaluation: the model does not record a data set; evaluate it on one with python -m fastvit_train eval "
        f"{printable(run)} --dataset NAME.",
    )  # fmt: skip


def _told_by(loaded: TrainedModel) -> dict[str, Any]:
    """What the model itself tells, named as in summary.json."""
    return {
        "model": printable(loaded.architecture),
        "parameters": loaded.parameters,
        "num_classes": len(loaded.classes),
        "model_size_mb": sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 1e6,
    }

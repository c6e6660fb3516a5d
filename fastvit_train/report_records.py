"""What there is to report of a run: what it wrote, and what its model says of the test set now."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastvit_train.comparison import read_summary
from fastvit_train.config import TrainConfig
from fastvit_train.errors import UserError, printable
from fastvit_train.evaluation import Evaluated, evaluate_run
from fastvit_train.loaded import FOLDER, LoadedRun, load_run
from fastvit_train.tracking import RunFolder, plain, read_rows

Read = TypeVar("Read")


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
    evaluated: Evaluated | None
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


def _read_record(run: str, data_dir: str | None) -> Record:
    path = Path(run.removeprefix(FOLDER))
    missing: list[str] = []

    def attempt(what: str, read: Callable[[], Read], otherwise: Read) -> Read:
        try:
            return read()
        except UserError as error:
            missing.append(f"{what}: {error}")
            return otherwise

    if not (path / "config.yaml").is_file():
        return _from_elsewhere(run, load_run(run))
    summary = attempt("No figures", lambda: read_summary(path), {})
    settings = attempt("No settings", lambda: {**plain(TrainConfig()), **RunFolder(path).read_config()}, {})
    epochs: list[dict[str, Any]] = []
    with suppress(OSError):  # the chart says that there are none
        epochs = read_rows(RunFolder(path).metrics)
    told = len(missing)
    loaded = attempt("No evaluation", lambda: load_run(run, device="cpu"), None)
    evaluated = None
    if loaded is not None:
        # Computed plainly, which any machine can: a run trained on a GPU may be reported on a laptop.
        attention = loaded.attention
        evaluated = attempt("No evaluation", lambda: evaluate_run(run, data_dir=data_dir, attention=attention), None)
        summary = summary or _told_by(loaded)
    if not (summary or epochs):
        raise UserError(f"there is nothing to report of {run}: {' '.join(missing)}")
    why = missing.pop() if len(missing) > told else ""
    return Record(run, printable(path.resolve().name), path, summary, epochs, settings, evaluated, tuple(missing), why)


def _from_elsewhere(run: str, loaded: LoadedRun) -> Record:
    return Record(
        run, loaded.name, loaded.folder, _told_by(loaded), [], {}, None,
        ("No figures, curves, settings and commands: it is no folder that a training of ours left, so there is no "
         "config.yaml, metrics.jsonl and summary.json.",),
        f"No evaluation: the model brings no data set; python -m fastvit_train eval {printable(run)} --dataset NAME "
        "evaluates it on one.",
    )  # fmt: skip


def _told_by(loaded: LoadedRun) -> dict[str, Any]:
    """What the model itself tells, named as in summary.json."""
    return {
        "model": printable(loaded.architecture),
        "parameters": loaded.parameters,
        "num_classes": len(loaded.classes),
        "model_size_mb": sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 1e6,
    }

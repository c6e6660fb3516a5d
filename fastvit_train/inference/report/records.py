"""The data of a report: for each run, the files that it wrote and a fresh evaluation of its model."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastvit_train.inference.evaluate import EvaluatedRun, evaluate_run
from fastvit_train.inference.trained_model import FOLDER, TrainedModel, load_run
from fastvit_train.runs.results import is_finished, read_results
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils.errors import UserError, counted, printable

Value = TypeVar("Value")
FILES_ALONE = "this page shows the run's files alone; python -m fastvit_train report writes one with an evaluation."
NOT_FINISHED = "the run is not finished; python -m fastvit_train eval takes the weights so far with --checkpoint."


@dataclass(frozen=True)
class RunRecord:
    """The data of one run. A field whose data are not available is empty, and `missing` gives the reason."""

    source: str
    """the run as the user named it"""
    name: str
    folder: Path | None
    summary: dict[str, Any]
    """summary.json, the results so far, or a few entries that are computed from the model"""
    epochs: list[dict[str, Any]]
    """the lines of metrics.jsonl"""
    settings: dict[str, Any]
    """config.yaml, flat; settings that are newer than the file have their defaults"""
    evaluated: EvaluatedRun | None
    missing: tuple[str, ...]
    """for each thing that is not available, a sentence with the reason"""
    evaluation_error: str
    """the reason if `evaluated` is None, otherwise empty"""


def load_records(runs: Sequence[str], data_dir: str | None, *, evaluate: bool = True) -> list[RunRecord]:
    """Load the runs and evaluate their models; each record has its own name.

    Args:
        runs: as in `load_run`.
        data_dir: the folder that holds the data; by default the folder that the runs used.
        evaluate: False takes the run's files alone, which is quick; no model is loaded.

    Raises:
        UserError: if a run has no data at all.
    """
    records = [_load_record(run, data_dir, evaluate) for run in runs]
    names = [record.name for record in records]
    return [replace(r, name=printable(r.source)) if names.count(r.name) > 1 else r for r in records]


def value_or_error(compute: Callable[[], Value]) -> tuple[Value | None, str]:
    """Call `compute`; return its value and an empty string, or None and the message of its UserError."""
    try:
        return compute(), ""
    except UserError as error:
        return None, str(error)


def _load_record(run: str, data_dir: str | None, evaluate: bool) -> RunRecord:
    path = Path(run.removeprefix(FOLDER))
    folder = RunFolder(path)
    if not folder.config.is_file():
        return _record_without_run(run, load_run(run))
    summary, summary_error = value_or_error(lambda: read_results(path))
    settings, settings_error = value_or_error(folder.read_config)
    epochs: list[dict[str, Any]] = []
    with suppress(OSError):  # without the file, the page has no curves
        epochs = read_jsonl(folder.metrics)
    loaded, evaluation_error = None, FILES_ALONE
    if evaluate and summary is not None and not is_finished(summary):
        evaluation_error = NOT_FINISHED  # the final weights, if there are any, are those of an earlier end
    elif evaluate:
        loaded, evaluation_error = value_or_error(lambda: load_run(run, device="cpu"))
    evaluated = None
    if loaded is not None:
        # load_run chose an attention that runs on every machine: a run from a GPU may be reported on a laptop.
        attention, summary = loaded.attention, summary or _summarize_model(loaded)
        evaluated, evaluation_error = value_or_error(lambda: evaluate_run(run, data_dir=data_dir, attention=attention))
    if not (summary or epochs):
        raise UserError(f"{run} has nothing to report: {summary_error}; {evaluation_error}")
    errors = {"No results": summary_error, "No settings": settings_error, "Not finished": _describe_progress(summary)}
    return RunRecord(
        run,
        printable(path.resolve().name),
        path,
        summary or {},
        epochs,
        settings or {},
        evaluated,
        tuple(f"{what}: {error}" for what, error in errors.items() if error),
        f"No evaluation: {evaluation_error}" if evaluation_error else "",
    )


def _describe_progress(summary: dict[str, Any] | None) -> str:
    if summary is None or is_finished(summary):
        return ""
    planned = counted(summary["planned_epochs"], "epoch")
    return (
        f"the page shows the results after {summary['epochs']} of {planned}; write it again when the training has "
        "gone on"
    )


def _record_without_run(source: str, loaded: TrainedModel) -> RunRecord:
    return RunRecord(
        source, loaded.name, loaded.folder, _summarize_model(loaded), [], {}, None,
        ("No results, curves, settings or commands: this is not the folder of a run, so it has no config.yaml, "
         "metrics.jsonl or summary.json.",),
        "No evaluation: the model does not record a data set; evaluate it on one with python -m fastvit_train eval "
        f"{printable(source)} --dataset NAME.",
    )  # fmt: skip


def _summarize_model(loaded: TrainedModel) -> dict[str, Any]:
    """Return the entries of summary.json that follow from the model."""
    return {
        "model": printable(loaded.architecture),
        "parameters": loaded.parameters,
        "num_classes": len(loaded.classes),
        "model_size_mb": sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 1e6,
    }

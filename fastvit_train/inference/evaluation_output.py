"""What `eval` prints and writes: metrics, the table of the classes, and pictures."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastvit_train.distributed import sync
from fastvit_train.inference.evaluate import EvaluatedRun
from fastvit_train.inference.trained_model import TrainedModel
from fastvit_train.runs import findings
from fastvit_train.runs.log import Log
from fastvit_train.runs.plots.figures import plot_confusion, plot_roc
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import counted
from fastvit_train.utils.safe_load import read_json

MAX_CLASSES_SHOWN = 20
MAX_CONFUSION_CLASSES = 200
"""with more classes, no confusion matrix is written or drawn"""


def metrics(evaluated: EvaluatedRun) -> dict[str, Any]:
    """Return the contents of evaluation.json.

    Accuracies, their standard errors, precision and recall are fractions, the loss is in nats; a class without images
    has recall None.
    """
    result, dataset, chosen = evaluated.evaluation, evaluated.dataset, evaluated.run.checkpoint
    per_class = zip(
        dataset.classes,
        result.labels.bincount(minlength=len(dataset.classes)).tolist(),
        result.precision().nan_to_num(-1).tolist(),
        result.recall().nan_to_num(-1).tolist(),
        strict=False,
    )
    return {
        "model": evaluated.run.architecture,
        "source": evaluated.run.source,
        "checkpoint": None if chosen is None else {"name": chosen.name, "epoch": chosen.epoch, "step": chosen.step},
        "steps": _steps(evaluated.run) if chosen is None else chosen.step,
        "dataset": dataset.name,
        "evaluated_on": dataset.evaluated_on,
        "images": result.samples,
        "tta": evaluated.tta,
        "accuracy": result.accuracy,
        "accuracy_error": result.accuracy_error,
        "balanced_accuracy": result.balanced_accuracy,
        "balanced_accuracy_error": result.balanced_accuracy_error,
        "macro_f1": result.macro_f1,
        "majority_share": result.majority_share,
        "top5_accuracy": result.top5_accuracy,
        "roc_auc": result.roc_auc,
        "average_precision": result.average_precision,
        "loss": result.loss,
        "expected_calibration_error": result.calibration_error(),
        "images_per_second": evaluated.images_per_second,
        "attention": evaluated.attention,
        "mixed_precision": evaluated.accelerator.mixed_precision,
        "world_size": evaluated.accelerator.num_processes,
        "device": evaluated.device,
        "classes": [
            {
                "name": name,
                "images": images,
                "precision": _none_if_negative(precision),
                "recall": _none_if_negative(recall),
            }
            for name, images, precision, recall in per_class
        ],
        "confusion": result.confusion().tolist() if result.num_classes <= MAX_CONFUSION_CLASSES else None,
    }


def _steps(run: TrainedModel) -> int | None:
    """Return how many steps the final weights were trained for; None if they are not a run's."""
    try:
        return None if run.folder is None else read_json(RunFolder(run.folder).summary)["steps"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _none_if_negative(value: float) -> float | None:
    return None if value < 0 else value


def show(evaluated: EvaluatedRun, output: Path | None) -> None:
    """Print the metrics, and write them and the confusion matrix to `output`, by default `eval/` in the run's folder.

    Raises:
        UserError: if they cannot be written.
    """
    accelerator = evaluated.accelerator
    values = metrics(evaluated)
    folder = output or evaluated.run.output_folder("eval" if evaluated.tta == "none" else f"eval-tta-{evaluated.tta}")
    log = Log(accelerator.is_main_process)
    if evaluated.run.checkpoint is not None:
        log.line(str(evaluated.run.checkpoint))
    for line in evaluated.dataset.notes:
        log.line(line)
    if evaluated.tta != "none":
        log.line(f"test-time augmentation {evaluated.tta}: not comparable with accuracies of one look at each image")
    top5 = f", top-5 {values['top5_accuracy']:.2%}" if len(values["classes"]) > 5 else ""  # otherwise always 100%
    log.line(
        f"{values['source']}: {values['dataset']} ({values['evaluated_on']}, {counted(values['images'], 'image')}) "
        f"accuracy {_with_error(values, 'accuracy')}, balanced {_with_error(values, 'balanced_accuracy')}{top5}, "
        f"macro F1 {values['macro_f1']:.2%}, always the most frequent class {values['majority_share']:.2%}, "
        f"loss {values['loss']:.6f}, "
        f"calibration error {values['expected_calibration_error']:.2%}, attention {values['attention']}"
    )
    if values["roc_auc"] is not None:
        log.line(
            f"class {values['classes'][1]['name']} against {values['classes'][0]['name']}, over all thresholds: "
            f"area under the ROC curve {values['roc_auc']:.4f}, average precision {values['average_precision']:.4f}"
        )
    log.console.print(_table(values))
    if warning := findings.constant_guess(values["accuracy"], values["majority_share"]):
        log.line(f"warning: {warning}")
    log.line(
        f"{values['images_per_second']:,.0f} img/s, including the loading of the images, on {values['device']}; "
        f"world size {values['world_size']}; mixed precision {values['mixed_precision']}"
    )
    written = sync.broadcast_from_rank0(accelerator, lambda: _write(evaluated, values, folder))
    log.line(f"written to {folder}: {', '.join(written)}")


def _with_error(values: dict[str, Any], name: str) -> str:
    return f"{values[name]:.2%} ± {100 * values[f'{name}_error']:.2f}"


def _write(evaluated: EvaluatedRun, values: dict[str, Any], folder: Path) -> list[str]:
    """Write the metrics and the confusion matrix; returns the names of the files."""
    with atomic_io.as_save_error(f"{folder} cannot be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_io.write_atomically(folder / "evaluation.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    written = ["evaluation.json"]
    if values["confusion"] is None:
        return written
    title = f"{evaluated.run.name} on {values['dataset']}: {values['accuracy']:.2%}"
    plot_confusion(evaluated.evaluation.confusion(), evaluated.dataset.classes, title, folder / "confusion.png")
    written.append("confusion.png")
    if values["roc_auc"] is not None:
        positive = evaluated.dataset.classes[1]
        plot_roc(*evaluated.evaluation.roc(), f"{positive}: {values['roc_auc']:.4f}", folder / "roc.png")
        written.append("roc.png")
    return written


def _table(values: dict[str, Any]) -> Table:
    """Precision and recall of each class, or only of those with the lowest recall if there are many classes."""
    classes = values["classes"]
    title = "by class"
    if len(classes) > MAX_CLASSES_SHOWN:
        classes = sorted(classes, key=lambda row: row["recall"] or 0)[:MAX_CLASSES_SHOWN]
        title = f"the {MAX_CLASSES_SHOWN} of {len(values['classes'])} classes with the lowest recall"
    table = Table("class", "images", "precision", "recall", title=title)
    for row in classes:
        shares = ("-" if row[key] is None else f"{row[key]:.2%}" for key in ("precision", "recall"))
        table.add_row(escape(row["name"]), f"{row['images']:,}", *shares)
    return table

"""Evaluate trained models on a data set: the verb `eval`."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from rich.markup import escape
from rich.table import Table

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.config.schema import DataConfig, DatasetName, ModelConfig, RunConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.inputs import build_eval_loader, load_data
from fastvit_train.data.loader import EvalLoader, RankInfo
from fastvit_train.distributed import sync
from fastvit_train.distributed.accelerator import device_name, start_accelerator
from fastvit_train.distributed.cpu_threads import all_cores
from fastvit_train.distributed.process_state import unchanged
from fastvit_train.inference.trained_model import TrainedModel, load_run, non_finite_error
from fastvit_train.models import check_attention, set_attention, set_block, warm_up
from fastvit_train.models.attention import AUTO, COMPILING, choose_attention
from fastvit_train.models.evaluator import Evaluation, evaluate_model
from fastvit_train.runs import findings
from fastvit_train.runs.log import Log
from fastvit_train.runs.plots.figures import plot_confusion
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils import atomic_io, memory
from fastvit_train.utils.errors import UserError, counted
from fastvit_train.utils.safe_load import read_json

MAX_BATCH_SIZE = 10**6
MAX_CLASSES_SHOWN = 20
MAX_CONFUSION_CLASSES = 200
"""with more classes, no confusion matrix is written or drawn"""


@dataclass(frozen=True)
class EvaluatedRun:
    """A trained model, the data set that it was evaluated on, and the results."""

    run: TrainedModel
    dataset: DatasetSpec
    evaluation: Evaluation
    images_per_second: float
    """of all ranks together, including the loading of the images, excluding compilation"""
    attention: str
    """the attention implementation that was used"""
    accelerator: Accelerator


@all_cores()
@unchanged()
def evaluate_run(
    run: str | Path,
    *,
    dataset: DatasetName | None = None,
    data_dir: str | None = None,
    attention: str | None = None,
    batch_size: int = RunConfig.eval_batch_size,
    checkpoint: str | int | None = None,
) -> EvaluatedRun:
    """Evaluate a trained model, on all ranks of the launch together.

    Args:
        run: as in `load_run`.
        dataset: evaluate on the test set of this data set; by default on the images that the run was evaluated on,
            which are held-out training images if the run had `--holdout`.
        data_dir: the folder that holds the data; by default the folder that the run used.
        attention: the attention implementation; by default the run's own, or a plain one for a model without a run.
            "auto" measures and takes the fastest.
        batch_size: images per step and rank.
        checkpoint: as in `load_run`.

    Raises:
        UserError: if the model, the attention or the data set is not available, if the data set has other classes than
            the model, or if the model's outputs are NaN or inf.
    """
    loaded = load_run(run, device="cpu", checkpoint=checkpoint)
    config = _configure(loaded, dataset, data_dir, attention, batch_size)
    recorded = loaded.config is not None and attention is None
    check_attention(config.model, recorded_in=RunFolder(Path(loaded.folder or "")).config if recorded else None)

    accelerator = start_accelerator(grad_accum=1, trackers=(), run_dir=loaded.folder or Path())
    if accelerator.device.type == "cpu":
        memory.retain_freed_memory()
    data = load_data(config, accelerator)
    _check_classes(loaded, data)
    rank_info = RankInfo(accelerator.device, accelerator.process_index, accelerator.num_processes)
    loader = build_eval_loader(config, data, rank_info)
    name = _set_attention(loaded, config.model.attention, loader, accelerator)
    set_block(loaded.model, config.model.block)
    model = accelerator.prepare_model(loaded.model, device_placement=True, evaluation_mode=True)
    if name in COMPILING:
        warm_up(model, 0, loader.batch_size, loaded.image_size, accelerator.device)
    started = time.perf_counter()
    result = evaluate_model(model, loader, accelerator)
    seconds = time.perf_counter() - started
    if damaged := int((~result.losses.isfinite()).sum()):
        raise non_finite_error(loaded, f" for {damaged:,} of {counted(result.samples, 'image')}")
    return EvaluatedRun(loaded, data, result, result.samples / seconds, name, accelerator)


def evaluate(
    run: str | Path,
    dataset: DatasetName | None = None,
    data_dir: str | None = None,
    attention: str | None = None,
    checkpoint: str | int | None = None,
) -> Evaluation:
    """Evaluate a trained model; all ranks of the launch share the work and return the same result.

    Args:
        run: as in `load_run`.
        dataset: evaluate on the test set of this data set; by default on the images that the run was evaluated on.
        data_dir: the folder that holds the data; by default the folder that the run used.
        attention: the attention implementation; by default the run's own, or a plain one for a model without a run.
        checkpoint: as in `load_run`.

    Raises:
        UserError: if the model, the attention or the data set is not available, if the data set has other classes than
            the model, or if the model's outputs are NaN or inf.
    """
    return evaluate_run(run, dataset=dataset, data_dir=data_dir, attention=attention, checkpoint=checkpoint).evaluation


def _configure(
    loaded: TrainedModel, dataset: DatasetName | None, data_dir: str | None, attention: str | None, batch_size: int
) -> ResolvedConfig:
    """Return the configuration of a run that would end in this evaluation."""
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"--batch-size {batch_size} is out of range; allowed: 1 to {MAX_BATCH_SIZE:,}")
    if loaded.config is None and dataset is None:
        raise UserError(f"{loaded.source} does not record a data set; give --dataset and --data-dir")
    data = loaded.config.data if loaded.config is not None else DataConfig()
    if dataset is not None:
        data = replace(data, holdout=0.0) if dataset == data.dataset else DataConfig(dataset=dataset)
    recorded = loaded.config.model.attention if loaded.config is not None else loaded.attention
    settings = TrainConfig(
        run=RunConfig(eval_batch_size=batch_size),
        model=ModelConfig(loaded.architecture, attention or recorded, "torch" if attention else _block(loaded)),
        data=replace(data, data_dir=data_dir or data.data_dir),
    )
    mean, std = loaded.normalisation
    return ResolvedConfig(
        settings,
        run_dir=loaded.folder or Path(),
        image_size=loaded.image_size,
        num_classes=loaded.num_classes,
        mean=mean,
        std=std,
        last_epoch=0,
    )


def _block(loaded: TrainedModel) -> Literal["torch", "cpp"]:
    """Return how the blocks were computed when the model was trained, if it was trained by a kernel for all passes."""
    return "cpp" if loaded.config is not None and loaded.config.model.block == "cpp" else "torch"


def _check_classes(loaded: TrainedModel, dataset: DatasetSpec) -> None:
    """Raise UserError unless the model and the data set have the same classes, by name if the model has names."""
    if loaded.class_names is None:
        same = loaded.config is not None or loaded.num_classes == len(dataset.classes)
    else:
        same = loaded.class_names == dataset.classes
    if not same:
        model, data = (list(names[:MAX_CLASSES_SHOWN]) for names in (loaded.classes, dataset.classes))
        raise UserError(
            f"{loaded.source} was trained on the classes {model}, but {dataset.name} has {data}; give another --dataset"
        )


def _set_attention(loaded: TrainedModel, name: str, loader: EvalLoader, accelerator: Accelerator) -> str:
    """Set the model's attention, the fastest one for "auto"; returns its name."""
    if name == AUTO:
        name, _ = choose_attention(loaded.model, loader.batch_size, loaded.image_size, accelerator)
    set_attention(loaded.model, name)
    return name


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
        "accuracy": result.accuracy,
        "accuracy_error": result.accuracy_error,
        "balanced_accuracy": result.balanced_accuracy,
        "balanced_accuracy_error": result.balanced_accuracy_error,
        "macro_f1": result.macro_f1,
        "majority_share": result.majority_share,
        "top5_accuracy": result.top5_accuracy,
        "loss": result.loss,
        "expected_calibration_error": result.calibration_error(),
        "images_per_second": evaluated.images_per_second,
        "attention": evaluated.attention,
        "mixed_precision": evaluated.accelerator.mixed_precision,
        "world_size": evaluated.accelerator.num_processes,
        "device": device_name(evaluated.accelerator.device),
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
    folder = output or evaluated.run.output_folder("eval")
    log = Log(accelerator.is_main_process)
    if evaluated.run.checkpoint is not None:
        log.line(str(evaluated.run.checkpoint))
    for line in evaluated.dataset.notes:
        log.line(line)
    top5 = f", top-5 {values['top5_accuracy']:.2%}" if len(values["classes"]) > 5 else ""  # otherwise always 100%
    log.line(
        f"{values['source']}: {values['dataset']} ({values['evaluated_on']}, {counted(values['images'], 'image')}) "
        f"accuracy {_with_error(values, 'accuracy')}, balanced {_with_error(values, 'balanced_accuracy')}{top5}, "
        f"macro F1 {values['macro_f1']:.2%}, always the most frequent class {values['majority_share']:.2%}, "
        f"loss {values['loss']:.6f}, "
        f"calibration error {values['expected_calibration_error']:.2%}, attention {values['attention']}"
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
    if values["confusion"] is None:
        return ["evaluation.json"]
    title = f"{evaluated.run.name} on {values['dataset']}: {values['accuracy']:.2%}"
    plot_confusion(evaluated.evaluation.confusion(), evaluated.dataset.classes, title, folder / "confusion.png")
    return ["evaluation.json", "confusion.png"]


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

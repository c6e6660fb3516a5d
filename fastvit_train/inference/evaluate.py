"""Trained models, evaluated on a data set: the verb `eval`."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.markup import escape
from rich.table import Table

from fastvit_train.config.schema import DataConfig, DatasetName, ModelConfig, RunConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import EvalLoader, RankInfo
from fastvit_train.distributed import env, sync
from fastvit_train.distributed.accelerator import device_name, start_accelerator
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.models import check_attention, set_attention, warm_up
from fastvit_train.models.attention import AUTO, COMPILING
from fastvit_train.models.evaluator import Evaluation, evaluate_model
from fastvit_train.runs.log import Log
from fastvit_train.runs.plots import plot_confusion
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.inputs import build_eval_loader, load_data
from fastvit_train.training.setup import choose_attention
from fastvit_train.utils import atomic_io, memory
from fastvit_train.utils.errors import UserError

MOST_CLASSES_SHOWN = 20
MOST_CONFUSED = 200
"""classes, for their confusion to be written and drawn"""


@dataclass(frozen=True)
class Evaluated:
    """A trained model, the data set that it was evaluated on, and what came of it."""

    run: TrainedModel
    dataset: DatasetSpec
    evaluation: Evaluation
    images_per_second: float
    """of all processes, input included, compiling not"""
    attention: str
    accelerator: Accelerator


def evaluate_run(
    run: str | Path,
    *,
    dataset: DatasetName | None = None,
    data_dir: str | None = None,
    attention: str | None = None,
    batch_size: int = RunConfig.eval_batch_size,
) -> Evaluated:
    """Evaluate a trained model, on all processes of the launch together.

    Args:
        run: as in `load_run`.
        dataset: evaluate on its test set; by default on what the run was evaluated on, be it held out of training.
        data_dir: where it lies, if no longer where the run found it.
        attention: how attention is computed; by default as in the run, or plainly. "auto" measures.
        batch_size: images per step and process.

    Raises:
        UserError: where the model, the attention or the data isn't to be had, or the data has other classes.
    """
    loaded = load_run(run, device="cpu")
    config = _settings(loaded, dataset, data_dir, attention, batch_size)
    recorded = loaded.config is not None and attention is None
    check_attention(config.model, recorded_in=RunFolder(Path(loaded.folder or "")).config if recorded else None)

    env.use_all_cores()
    accelerator = start_accelerator(grad_accum=1, trackers=(), run_dir=loaded.folder or Path())
    if accelerator.device.type == "cpu":
        memory.retain_freed_memory()
    data = load_data(config, accelerator)
    _check_classes(loaded, data)
    rank_info = RankInfo(accelerator.device, accelerator.process_index, accelerator.num_processes)
    loader = build_eval_loader(config, data, loaded.model, rank_info)
    name = _put_attention(loaded, config.model.attention, loader, accelerator)
    model = accelerator.prepare_model(loaded.model, device_placement=True, evaluation_mode=True)
    started = time.perf_counter()
    result = evaluate_model(model, loader, accelerator)
    seconds = time.perf_counter() - started
    if spoilt := int((~result.losses.isfinite()).sum()):
        raise UserError(
            f"{loaded.source} answers {spoilt:,} of {result.samples:,} images with infinities or no numbers"
        )
    return Evaluated(loaded, data, result, result.samples / seconds, name, accelerator)


def evaluate(
    run: str | Path, dataset: DatasetName | None = None, data_dir: str | None = None, attention: str | None = None
) -> Evaluation:
    """Evaluate a trained model; all processes of the launch do it together and get the same.

    Args:
        run: as in `load_run`.
        dataset: evaluate on its test set; by default on what the run was evaluated on, be it held out of training.
        data_dir: where it lies, if no longer where the run found it.
        attention: how attention is computed; by default as in the run, or plainly.

    Raises:
        UserError: where the model, the attention or the data isn't to be had, or the data has other classes.
    """
    return evaluate_run(run, dataset=dataset, data_dir=data_dir, attention=attention).evaluation


def _settings(
    loaded: TrainedModel, dataset: DatasetName | None, data_dir: str | None, attention: str | None, batch_size: int
) -> TrainConfig:
    """What a run of training would have for settings that ended in this evaluation."""
    if not 1 <= batch_size <= 10**6:
        raise UserError(f"--batch-size {batch_size} is out of range; allowed: 1 to 1,000,000")
    if loaded.config is None and dataset is None:
        raise UserError(f"{loaded.source} brings no data set; say which with --dataset, and where with --data-dir")
    own = loaded.config.data if loaded.config is not None else DataConfig()
    if dataset is not None:
        own = replace(own, holdout=0.0) if dataset == own.dataset else DataConfig(dataset=dataset)
    recorded = loaded.config.model.attention if loaded.config is not None else loaded.attention
    return TrainConfig(
        run=RunConfig(eval_batch_size=batch_size),
        model=ModelConfig(
            loaded.architecture, attention or recorded, num_classes=loaded.num_classes, image_size=loaded.image_size
        ),
        data=replace(own, data_dir=data_dir or own.data_dir),
    )


def _check_classes(loaded: TrainedModel, dataset: DatasetSpec) -> None:
    """Raise UserError unless the model names its outputs as the data set names its classes, where it names them."""
    if loaded.class_names is None:
        fits = loaded.config is not None or loaded.num_classes == len(dataset.classes)
    else:
        fits = loaded.class_names == dataset.classes
    if not fits:
        trained, found = list(loaded.classes[:MOST_CLASSES_SHOWN]), list(dataset.classes[:MOST_CLASSES_SHOWN])
        raise UserError(f"{loaded.source} was trained on the classes {trained}, {dataset.name} has {found}")


def _put_attention(loaded: TrainedModel, name: str, loader: EvalLoader, accelerator: Accelerator) -> str:
    """Have the model compute with attention `name`, measured for "auto" and compiled where it compiles."""
    if name == AUTO:
        name, _ = choose_attention(loaded.model, loader.batch_size, loaded.image_size, accelerator)
    set_attention(loaded.model, name)
    if name in COMPILING:
        with accelerator.autocast():
            warm_up(loaded.model, 0, loader.batch_size, loaded.image_size, accelerator.device)
    return name


def figures(evaluated: Evaluated) -> dict[str, Any]:
    """What evaluation.json holds; fractions, nats and seconds, null where a class has no images."""
    result, dataset = evaluated.evaluation, evaluated.dataset
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
        "dataset": dataset.name,
        "evaluated_on": dataset.evaluated_on,
        "images": result.samples,
        "accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        "loss": result.loss,
        "expected_calibration_error": result.calibration_error(),
        "images_per_second": evaluated.images_per_second,
        "attention": evaluated.attention,
        "mixed_precision": evaluated.accelerator.mixed_precision,
        "world_size": evaluated.accelerator.num_processes,
        "device": device_name(evaluated.accelerator.device),
        "classes": [
            {"name": name, "images": images, "precision": _share(precision), "recall": _share(recall)}
            for name, images, precision, recall in per_class
        ],
        "confusion": result.confusion().tolist() if result.num_classes <= MOST_CONFUSED else None,
    }


def _share(value: float) -> float | None:
    return None if value < 0 else value


def show(evaluated: Evaluated, output: Path | None) -> None:
    """Print the figures, and write them and the confusion matrix to `output`, by default `eval/` in the run's folder.

    Raises:
        UserError: where they can't be written.
    """
    accelerator = evaluated.accelerator
    found = figures(evaluated)
    folder = output or (evaluated.run.folder or Path()) / "eval"
    written = sync.broadcast_from_rank0(accelerator, lambda: _write(evaluated, found, folder))
    log = Log(accelerator.is_main_process)
    log.line(
        f"{found['source']}: {found['dataset']} ({found['evaluated_on']}, {found['images']:,} images) "
        f"accuracy {found['accuracy']:.2%}, top-5 {found['top5_accuracy']:.2%}, loss {found['loss']:.6f}, "
        f"calibration error {found['expected_calibration_error']:.2%}, attention {found['attention']}"
    )
    log.console.print(_table(found))
    log.line(
        f"{found['images_per_second']:,.0f} img/s, input included, on {found['device']}; "
        f"world size {found['world_size']}; mixed precision {found['mixed_precision']}"
    )
    log.line(f"written to {folder}: {', '.join(written)}")


def _write(evaluated: Evaluated, found: dict[str, Any], folder: Path) -> list[str]:
    """Write the figures and the confusion matrix; returns the files' names."""
    with atomic_io.as_save_error(f"{folder} can't be written; choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_io.write_atomically(folder / "evaluation.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    if found["confusion"] is None:
        return ["evaluation.json"]
    title = f"{evaluated.run.name} on {found['dataset']}: {found['accuracy']:.2%}"
    plot_confusion(evaluated.evaluation.confusion(), evaluated.dataset.classes, title, folder / "confusion.png")
    return ["evaluation.json", "confusion.png"]


def _table(found: dict[str, Any]) -> Table:
    """Precision and recall per class; of many classes those that are recognised worst."""
    classes = found["classes"]
    title = "per class"
    if len(classes) > MOST_CLASSES_SHOWN:
        classes = sorted(classes, key=lambda row: row["recall"] or 0)[:MOST_CLASSES_SHOWN]
        title = f"the {MOST_CLASSES_SHOWN} of {len(found['classes'])} classes with the lowest recall"
    table = Table("class", "images", "precision", "recall", title=title)
    for row in classes:
        shares = ("-" if row[key] is None else f"{row[key]:.2%}" for key in ("precision", "recall"))
        table.add_row(escape(row["name"]), f"{row['images']:,}", *shares)
    return table

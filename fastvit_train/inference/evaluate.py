"""Evaluate trained models on a data set: the verb `eval`, whose output is in `evaluation_output`."""

import time
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from fastvit_train.config.overrides import override
from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.inputs import build_eval_loader, load_data
from fastvit_train.data.loader import EvalLoader, RankInfo
from fastvit_train.distributed.accelerator import device_name, start_accelerator
from fastvit_train.distributed.cpu_threads import all_cores
from fastvit_train.distributed.process_state import unchanged
from fastvit_train.inference.trained_model import TrainedModel, load_run, non_finite_error
from fastvit_train.inference.tta import TTA, AveragedViews
from fastvit_train.models import check_attention, set_attention, set_block, warm_up
from fastvit_train.models.attention import AUTO, COMPILING, choose_attention
from fastvit_train.models.evaluator import Evaluation, evaluate_model
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError, counted

MAX_BATCH_SIZE = 10**6
MAX_CLASSES_NAMED = 20
"""classes that an error names"""


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
    device: str
    """the name of the device, for a CPU with the number of threads"""
    tta: TTA
    """test-time augmentation"""


@all_cores()
@unchanged()
def evaluate_run(
    run: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    attention: str | None = None,
    batch_size: int = RunConfig.eval_batch_size,
    checkpoint: str | int | None = None,
    tta: TTA = "none",
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
        tta: test-time augmentation, as in `AveragedViews`; "none" looks at each image once.

    Raises:
        UserError: if the model, the attention or the data set is not available, if the data set has other classes than
            the model, or if the model's outputs are NaN or inf.
    """
    loaded = load_run(run, device="cpu", checkpoint=checkpoint)
    config = _configure(loaded, dataset, data_dir, attention, batch_size)
    accelerator = start_accelerator(grad_accum=1, trackers=(), run_dir=loaded.folder or Path())
    recorded = loaded.config is not None and attention is None
    recorded_in = RunFolder(Path(loaded.folder or "")).config if recorded else None
    check_attention(config.model, accelerator.device, recorded_in)
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
        warm_up(model, 0, loader.batch_size, loaded.input_size, accelerator.device)
    viewed = model if tta == "none" else AveragedViews(model, tta)
    started = time.perf_counter()
    result = evaluate_model(viewed, loader, accelerator)
    seconds = time.perf_counter() - started
    if damaged := int((~result.losses.isfinite()).sum()):
        raise non_finite_error(loaded, f" for {damaged:,} of {counted(result.samples, 'image')}")
    speed, device = result.samples / seconds, device_name(accelerator.device)
    return EvaluatedRun(loaded, data, result, speed, name, accelerator, device, tta)


def evaluate(
    run: str | Path,
    dataset: str | None = None,
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
    loaded: TrainedModel, dataset: str | None, data_dir: str | None, attention: str | None, batch_size: int
) -> ResolvedConfig:
    """Return the configuration of a run that would end in this evaluation."""
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise UserError(f"--batch-size {batch_size} is out of range; allowed: 1 to {MAX_BATCH_SIZE:,}")
    if loaded.config is None and dataset is None:
        raise UserError(f"{loaded.source} does not record a data set; give --dataset and --data-dir")
    data = loaded.config.data if loaded.config is not None else DataConfig()
    if dataset is not None:
        other = override(TrainConfig(), {"dataset": dataset}, "eval").data
        other = replace(other, **asdict(loaded.rendering))
        data = replace(data, holdout=0.0) if dataset == data.dataset else other
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
        input_size=loaded.input_size,
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
    else:  # the model's names are normalized; those of parquet and tar files are as they were written
        same = loaded.class_names == tuple(unicodedata.normalize("NFC", name) for name in dataset.classes)
    if not same:
        model, data = (list(names[:MAX_CLASSES_NAMED]) for names in (loaded.classes, dataset.classes))
        raise UserError(
            f"{loaded.source} was trained on the classes {model}, but {dataset.name} has {data}; give another --dataset"
        )


def _set_attention(loaded: TrainedModel, name: str, loader: EvalLoader, accelerator: Accelerator) -> str:
    """Set the model's attention, the fastest one for "auto"; returns its name."""
    if name == AUTO:
        name, _ = choose_attention(loaded.model, loader.batch_size, loaded.input_size, accelerator)
    set_attention(loaded.model, name)
    return name

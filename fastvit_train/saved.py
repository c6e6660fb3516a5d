"""Runs that were made, read back."""

from dataclasses import replace
from pathlib import Path

from fastvit_train import launch, memory
from fastvit_train.config import TrainConfig, override
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import Place
from fastvit_train.errors import UserError
from fastvit_train.evaluate import Evaluation, evaluate
from fastvit_train.inputs import build_eval_loader, image_size, load_data, num_classes
from fastvit_train.models import build_model, check_attention, warm_up
from fastvit_train.models.attention import AUTO, COMPILING
from fastvit_train.reading import read_json
from fastvit_train.setup import choose_attention, resolve
from fastvit_train.tracking import Log, RunFolder


def evaluate_run(run: Path, attention: str | None = None, data_dir: str | None = None) -> Evaluation:
    """Evaluate the final weights of the run in folder `run` on the data it was evaluated on, and print the result.

    Raises:
        UserError: where `run` is no finished run, or the attention or the data isn't to be had.
    """
    config = override(TrainConfig(), RunFolder(run).read_config(), str(RunFolder(run).config))
    weights = run / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{run} has no model.safetensors: it isn't finished; go on with --resume must")
    model_config = replace(config.model, weights=str(weights), attention=attention or config.model.attention)
    data_config = replace(config.data, data_dir=data_dir or config.data.data_dir)
    config = replace(config, model=model_config, data=data_config)
    check_attention(config.model, recorded_in=None if attention else RunFolder(run).config)
    config = resolve(config)

    launch.use_all_cores()
    accelerator = launch.start(grad_accum=1, trackers=(), run_dir=run)
    if accelerator.device.type == "cpu":
        memory.keep_freed()
    dataset = load_data(config, accelerator)
    _check_classes(run, dataset)
    model = build_model(config.model, image_size(config), num_classes(config, dataset))
    place = Place(accelerator.device, accelerator.process_index, accelerator.num_processes)
    loader = build_eval_loader(config, dataset, model, place)
    name = config.model.attention
    if name == AUTO:
        name, _ = choose_attention(model, loader.batch_size, image_size(config), accelerator)
    if name in COMPILING:
        with accelerator.autocast():
            warm_up(model, 0, loader.batch_size, image_size(config), accelerator.device)
    model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    result = evaluate(model, loader, accelerator)
    Log(accelerator.is_main_process).line(
        f"{run}: {dataset.name} ({dataset.evaluated_on}, {result.samples:,} images) accuracy {result.accuracy:.2%}, "
        f"loss {result.loss:.6f}, attention {name}"
    )
    accelerator.end_training()
    return result


def _check_classes(run: Path, dataset: DatasetSpec) -> None:
    """Raise UserError unless the data set's classes are those that the run's model names its outputs by."""
    try:
        trained = read_json(run / "config.json").get("label_names", list(dataset.classes))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{run} is no finished run: its config.json can't be read ({error})") from None
    if trained != list(dataset.classes):
        raise UserError(f"{run} was trained on the classes {trained}, {dataset.name} has {list(dataset.classes)}")

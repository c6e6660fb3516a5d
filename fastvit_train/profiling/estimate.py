"""--dry-run: the resolved settings of a run, its model's shapes, and the memory, time and disk that it will need."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.profiler import record_function

from fastvit_train.config import settings_file
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env
from fastvit_train.models.resolve import resolve
from fastvit_train.models.shapes import Stage, stages, tokens
from fastvit_train.profiling.short_run import eager_copy, make_progress_bar, short_run, time_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.errors import counted
from fastvit_train.utils.timing import quartiles, time_call

STEPS, ROUNDS = 3, 3
MIB = 2**20


@dataclass(frozen=True)
class RunEstimate:
    """What a whole run will need."""

    memory_mib: float
    """peak of one process"""
    epochs: int
    images_per_second: float
    """of training, all processes together"""
    epoch_seconds: float
    """of training and evaluation"""
    seconds: float
    """of all epochs"""
    checkpoint_bytes: int
    weights_bytes: int
    disk_bytes: int
    """peak of checkpoints and weights together"""


def dry_run(config: TrainConfig) -> RunEstimate:
    """Print the resolved settings, the model's shapes, and an estimate of the run from a few measured steps.

    Nothing is written into the run's folder. If the data set is not on this machine, synthetic images of its shape and
    number are used, and a line says so.

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch.
    """
    with short_run(config, STEPS) as session:
        resolved = replace(resolve(config).settings, model=session.config.model)
        session.log.line(f"\nsettings, as --config takes them:\n{settings_file.to_yaml(resolved)}")
        if not env.uses_fsdp():
            session.log.console.print(shapes_table(session))
        estimate = estimate_run(session)
        for line in format_estimate(session, estimate):
            session.log.line(line)
    return estimate


def estimate_run(session: TrainSession) -> RunEstimate:
    """Train some steps of a short run, and estimate from them what the whole run will need."""
    bar = make_progress_bar(session)
    time_epoch(session, bar, record_function)
    step = quartiles([time_epoch(session, bar, record_function) for _ in range(ROUNDS)]).median
    run = session.config.run
    steps = len(session.dataset.train.labels) // session.batch_size
    epoch_seconds = step * steps + evaluation_seconds(session)
    epochs = session.config.last_epoch
    weights, checkpoint = weights_bytes(session), checkpoint_bytes(session)
    copies = epochs // run.save_model_every if run.save_model_every else 0
    return RunEstimate(
        memory.peak_mib(session.accelerator.device),
        epochs,
        session.batch_size / step,
        epoch_seconds,
        epoch_seconds * epochs,
        checkpoint,
        weights,
        (run.keep + 2) * checkpoint + (2 + copies) * weights,  # the final and the best ones too
    )


@torch.no_grad()
def evaluation_seconds(session: TrainSession) -> float:
    """Estimate the seconds of a whole evaluation from one batch, measured after a batch of warm-up."""
    loader = session.eval_loader
    session.eval_model.eval()
    batches = loader.padded_size // (loader.batch_size * session.accelerator.num_processes)

    def evaluate_batch() -> None:
        images, _, _ = next(iter(loader))
        session.eval_model(images)

    evaluate_batch()  # warm-up
    return time_call(evaluate_batch, session.accelerator.device) * batches


def weights_bytes(session: TrainSession) -> int:
    """Bytes of the weights."""
    return _total_bytes(session.bare_model.state_dict().values())


def checkpoint_bytes(session: TrainSession) -> int:
    """Bytes of a checkpoint: weights, their averages and the optimizer's state, which the first step creates."""
    states = session.optimizer.state.values()
    optimizer = sum(_total_bytes(value for value in state.values() if isinstance(value, Tensor)) for state in states)
    averages = sum(average is not None for average in (session.ema, session.average))
    return weights_bytes(session) * (1 + averages) + optimizer


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shapes_table(session: TrainSession) -> Table:
    """List the model's parts with the shape of their output for one image; a row holds all equal parts in sequence."""
    size, model = session.config.input_size, eager_copy(session)
    parts = stages(model, size)
    own_parameters = [(name, p.numel()) for name, p in model.named_parameters(recurse=False)]
    table = Table("part", box=box.SIMPLE_HEAD)
    table.add_column("output", justify="right")
    table.add_column("parameters", justify="right")
    table.add_row("input", _format_shape(size), "")
    if (count := tokens(parts)) is not None:
        table.add_row("tokens", str(count), "")
    for name, parameters in own_parameters:
        table.add_row(name, "", f"{parameters:,}")
    for (shape, parameters), equal_parts in groupby(parts, key=lambda part: (part.shape, part.parameters)):
        table.add_row(_format_names(list(equal_parts)), _format_shape(shape), f"{parameters:,}")
    table.add_row("logits", str(session.config.num_classes), "")
    table.add_row("all", "", f"{sum(p.numel() for p in model.parameters()):,}")
    return table


def _format_names(parts: list[Stage]) -> str:
    return parts[0].name if len(parts) == 1 else f"{parts[0].name} to {parts[-1].name}, each"


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def format_estimate(session: TrainSession, estimate: RunEstimate) -> list[str]:
    """Format the estimate as lines to print."""
    checkpoint, weights, disk = (
        f"{size / MIB:,.1f} MiB" for size in (estimate.checkpoint_bytes, estimate.weights_bytes, estimate.disk_bytes)
    )
    epoch, total = format_duration(estimate.epoch_seconds), format_duration(estimate.seconds)
    return [
        f"estimated from measurements of {STEPS * ROUNDS} training steps of {counted(session.batch_size, 'image')} and "
        "of one evaluation batch:",
        f"  memory  {estimate.memory_mib:,.0f} MiB per process",
        f"  speed   {estimate.images_per_second:,.0f} img/s in training, all processes together",
        f"  time    {epoch} per epoch with its evaluation, {total} in total ({counted(estimate.epochs, 'epoch')})",
        f"  disk    {disk} at most: checkpoints of {checkpoint} (the newest {session.config.run.keep}, the best and "
        f"the one being written) and weights of {weights}",
        "this was a dry run and nothing was saved; to train, run the same command without --dry-run",
    ]


def format_duration(seconds: float) -> str:
    """Format seconds as "9.8 s", "12 min" or "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:,.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"

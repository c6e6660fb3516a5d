"""A training tried out before it is started: settings, shapes, and what it will take."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.profiler import record_function

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env
from fastvit_train.models.resolve import resolve
from fastvit_train.models.shapes import Stage, stages, tokens
from fastvit_train.profiling.short_run import bar_of, plain_model, short_run, timed_epoch
from fastvit_train.runs.run_folder import config_to_yaml
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.timing import quartiles, time_call

STEPS, ROUNDS = 3, 3
MIB = 2**20


@dataclass(frozen=True)
class Expected:
    """What a run will take, from its start to its end."""

    memory_mib: float
    """peak of one process"""
    epochs: int
    images_per_second: float
    """of all processes, in training"""
    epoch_seconds: float
    """training and evaluating"""
    seconds: float
    """of all epochs"""
    checkpoint_bytes: int
    weights_bytes: int
    disk_bytes: int
    """the most that checkpoints and weights take at once"""


def dry_run(config: TrainConfig) -> Expected:
    """Print the settings that `config` comes to, the model's shapes, and what a few measured steps let expect.

    Nothing of the run is written; a data set that has to be downloaded is, as it is needed in any case.

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch.
    """
    with short_run(config, STEPS) as session:
        resolved = replace(resolve(config).settings, model=session.config.model)
        session.log.line(f"\nsettings, as --config takes them:\n{config_to_yaml(resolved)}")
        if not env.sharded():
            session.log.console.print(shapes_table(session))
        expected = expect(session)
        for line in lines(session, expected):
            session.log.line(line)
    return expected


def expect(session: TrainSession) -> Expected:
    """What the run that was set up as a trial will take; some steps of it are trained."""
    bar = bar_of(session)
    timed_epoch(session, bar, record_function)
    step = quartiles([timed_epoch(session, bar, record_function) for _ in range(ROUNDS)]).median
    run = session.config.run
    steps = len(session.dataset.train.labels) // session.batch_size
    epoch_seconds = step * steps + evaluation_seconds(session)
    epochs = min(run.epochs, run.stop_after or run.epochs)
    weights, checkpoint = weights_bytes(session), checkpoint_bytes(session)
    copies = epochs // run.save_model_every if run.save_model_every else 0
    return Expected(
        memory.peak_mib(session.accelerator.device),
        epochs,
        session.batch_size / step,
        epoch_seconds,
        epoch_seconds * epochs,
        checkpoint,
        weights,
        (run.keep + 2) * checkpoint + (1 + copies) * weights,
    )


@torch.no_grad()
def evaluation_seconds(session: TrainSession) -> float:
    """Seconds of an evaluation, from one batch of it; the batch before it is for warming up."""
    loader, device = session.eval_loader, session.accelerator.device
    session.eval_model.eval()
    batches = loader.padded_size // (loader.batch_size * session.accelerator.num_processes)

    def evaluate_batch() -> None:
        images, _, _ = next(iter(loader))
        session.eval_model(images)

    evaluate_batch()  # to warm up
    return time_call(evaluate_batch, device) * batches


def weights_bytes(session: TrainSession) -> int:
    """Bytes of the weights."""
    return _bytes(session.bare_model.state_dict().values())


def checkpoint_bytes(session: TrainSession) -> int:
    """Bytes of a checkpoint: weights, their moving average, and what the optimizer keeps, which must have stepped."""
    states = session.optimizer.state.values()
    kept = sum(_bytes(value for value in state.values() if isinstance(value, Tensor)) for state in states)
    return weights_bytes(session) * (1 if session.ema is None else 2) + kept


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shapes_table(session: TrainSession) -> Table:
    """What the model does to an image, part by part; parts that are alike and follow each other in one row."""
    size, model = session.config.image_size, plain_model(session)
    passed = stages(model, size)
    own = [(name, p.numel()) for name, p in model.named_parameters(recurse=False)]
    table = Table("part", box=box.SIMPLE_HEAD)
    table.add_column("output", justify="right")
    table.add_column("parameters", justify="right")
    table.add_row("input", _by((3, size, size)), "")
    if (count := tokens(passed)) is not None:
        table.add_row("tokens", str(count), "")
    for name, parameters in own:
        table.add_row(name, "", f"{parameters:,}")
    for (shape, parameters), group in groupby(passed, key=lambda stage: (stage.shape, stage.parameters)):
        table.add_row(_together(list(group)), _by(shape), f"{parameters:,}")
    table.add_row("logits", str(session.config.num_classes), "")
    table.add_row("all", "", f"{sum(p.numel() for p in model.parameters()):,}")
    return table


def _together(alike: list[Stage]) -> str:
    return alike[0].name if len(alike) == 1 else f"{alike[0].name} to {alike[-1].name}, each"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def lines(session: TrainSession, expected: Expected) -> list[str]:
    """What is expected, in words."""
    checkpoint, weights, disk = (
        f"{size / MIB:,.1f} MiB" for size in (expected.checkpoint_bytes, expected.weights_bytes, expected.disk_bytes)
    )
    epoch, whole = in_words(expected.epoch_seconds), in_words(expected.seconds)
    return [
        f"expected, by {STEPS * ROUNDS} training steps of {session.batch_size} images "
        "and a batch of evaluation, measured:",
        f"  memory  {expected.memory_mib:,.0f} MiB per process",
        f"  speed   {expected.images_per_second:,.0f} img/s in training, all processes together",
        f"  time    {epoch} per epoch with its evaluation, {whole} in all ({expected.epochs} epochs)",
        f"  disk    {disk} at most: checkpoints of {checkpoint} (the newest {session.config.run.keep}, the best and "
        f"the one being written) and weights of {weights}",
        "nothing was trained or written; the same without --dry-run does it",
    ]


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 100:
        return f"{seconds:,.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"

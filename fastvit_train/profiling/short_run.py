"""A run tried out: some steps of it, timed, with its folder left alone."""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.models import set_attention
from fastvit_train.training.loop import Phase, train_epoch
from fastvit_train.training.progress_bar import ProgressBar
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from fastvit_train.utils.errors import UserError


def make_output(folder: Path) -> None:
    """Make the folder that the figures will go to; UserError where it can't be written, before hours of measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror or error}); choose another --output") from None


@contextmanager
def short_run(config: TrainConfig, steps: int) -> Iterator[TrainSession]:
    """The run that `config` describes, ready to train, with epochs of `steps` steps at most.

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, runs_dir=folder, exp_name="trial", track=(), save_every=0)
        session = setup(replace(config, run=run), "never", overwrite=False)
        session.train_loader.steps_per_epoch = min(steps, session.train_loader.steps_per_epoch)
        with closing(session):
            yield session
            session.accelerator.end_training()


def bar_of(session: TrainSession) -> ProgressBar:
    """What shows an epoch of a trial."""
    return ProgressBar(session.log.console, session.train_loader.steps_per_epoch, 1, session.accelerator.num_processes)


def timed_epoch(session: TrainSession, bar: ProgressBar, phase: Phase) -> float:
    """Train for an epoch; returns its seconds per step."""
    started = time.perf_counter()
    train_epoch(session, bar, phase)
    seconds = time.perf_counter() - started
    session.state.close_epoch()
    return seconds / session.train_loader.steps_per_epoch


def plain_model(session: TrainSession) -> nn.Module:
    """A copy of the run's model that runs on every device: eager, with the attention that needs no compiler."""
    model = copy.deepcopy(session.bare_model).train()  # a copy is not compiled
    with suppress(UserError):  # a model that keeps its own attention
        set_attention(model, "fused")
    return model

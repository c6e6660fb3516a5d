"""A short run: some training steps of a configured run, timed, without writing into the run's folder."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.models import set_attention, set_block
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.loop import Phase, train_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import time_call


def create_output_folder(folder: Path) -> None:
    """Create the folder for the results before anything is measured; UserError if it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror or error}); choose another --output") from None


@contextmanager
def short_run(config: TrainConfig, steps: int) -> Iterator[TrainSession]:
    """Set up the run that `config` describes in a temporary folder, with at most `steps` steps per epoch.

    A data set that is not on this machine is not downloaded: synthetic images of its shape take its place.

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, runs_dir=folder, exp_name="short-run", track=(), save_every=0)
        session = setup(replace(config, run=run), "never", overwrite=False, imitate_data=True)
        session.train_loader.steps_per_epoch = min(steps, session.train_loader.steps_per_epoch)
        with closing(session):
            yield session
            session.accelerator.end_training()


def make_progress_bar(session: TrainSession) -> ProgressBar:
    """Build the progress bar for the epochs of a short run."""
    return ProgressBar(session.log.console, session.train_loader.steps_per_epoch, 1, session.accelerator.num_processes)


def time_epoch(session: TrainSession, bar: ProgressBar, phase: Phase) -> float:
    """Train for one epoch and return the seconds per step."""
    seconds = time_call(lambda: train_epoch(session, bar, phase))  # train_epoch waits for the device at its end
    session.state.close_epoch()
    return seconds / session.train_loader.steps_per_epoch


def eager_copy(session: TrainSession) -> nn.Module:
    """Copy the run's model in training mode: uncompiled, with an attention and blocks that run on every device.

    It keeps its activations: those that --grad-checkpointing computes again are not counted as work.
    """
    model = copy.deepcopy(session.bare_model).train()  # a copy is not compiled
    if session.config.run.grad_checkpointing:
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    with suppress(UserError):  # some of timm's models only have their own attention
        set_attention(model, "fused")
    set_block(model, "torch")
    return model

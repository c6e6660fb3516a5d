"""Losses and correct predictions of the epoch under way: summed on the device, read a few times per epoch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fastvit_train.distributed import sync
from fastvit_train.training.checkpointing import name_last_checkpoint
from fastvit_train.training.optim.optimizer import peak_lr
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.torch_private import current_scale


@dataclass
class EpochTotals:
    """This rank's totals; they stay on the device, so that no step waits for them."""

    losses: Tensor
    """loss of each step of the epoch, nats, (steps,); 0 for the steps to come"""
    correct: Tensor
    """number of training images that were classified correctly, ()"""
    skipped: Tensor
    """number of optimizer steps of the whole run that the gradient scaler of fp16 skipped, int64 ()"""

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> Self:
        """Return the totals at the start of an epoch of `steps` steps."""
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        return cls(torch.zeros(steps, device=device), torch.zeros((), device=device), skipped)

    def copy_(self, other: Self) -> None:
        """Take over the values of `other`, which may have fewer steps."""
        self.losses[: len(other.losses)].copy_(other.losses)
        self.correct.copy_(other.correct)
        self.skipped.copy_(other.skipped)

    def is_nonfinite(self) -> Tensor:
        """Return a boolean scalar on the device: whether some loss is NaN or inf."""
        return ~self.losses.isfinite().all()

    @contextmanager
    def count_skipped(self, scaler: torch.amp.GradScaler | None) -> Iterator[None]:
        """Count the optimizer step inside the context if `scaler` skips it, which lowers its scale."""
        if scaler is None:
            yield
            return
        before = current_scale(scaler).clone()
        yield
        self.skipped += current_scale(scaler) < before


def restore_totals(session: TrainSession) -> EpochTotals:
    """Return this rank's part of the totals that `session.state` holds: zeros, unless the epoch is resumed midway."""
    device, state = session.accelerator.device, session.state
    totals = EpochTotals.zeros(session.train_loader.steps_per_epoch, device)
    totals.losses[: len(state.epoch_losses)] = torch.tensor(state.epoch_losses)
    if session.accelerator.is_main_process:
        totals.correct += state.epoch_correct
    totals.skipped += state.skipped_steps
    return totals


def collect_totals(session: TrainSession, totals: EpochTotals) -> None:
    """Bring the totals of all ranks, and the time and energy that they took, into `session.state`.

    The host waits for the device here.

    Raises:
        UserError: if a loss is NaN or inf; the message names the first such step and its images.
    """
    accelerator, state = session.accelerator, session.state
    state.epoch_losses = accelerator.reduce(totals.losses[: state.step_in_epoch], "mean").tolist()
    state.epoch_correct = float(accelerator.reduce(totals.correct, "sum"))
    state.skipped_steps = int(totals.skipped)
    state.add_usage(sync.sum_usage_over_ranks(accelerator, session.meter, session.meter.stop()))
    for index, loss in enumerate(state.epoch_losses):
        if not math.isfinite(loss):
            raise UserError(_describe_nonfinite_loss(session, index, loss))


def _describe_nonfinite_loss(session: TrainSession, index: int, loss: float) -> str:
    """Return the error message for the step at `index` of the epoch, whose loss is NaN or inf."""
    state = session.state
    samples = session.train_loader.sample_order(state.epoch)[index].flatten().tolist()
    step = state.step - state.step_in_epoch + index + 1
    session.scheduler.step_update(step - 1)  # back to the learning rate of that step
    return (
        f"the loss became {loss} at step {step} "
        f"(epoch {state.epoch + 1}, learning rate {peak_lr(session.optimizer):g}); "
        f"lower --lr (now {session.config.optim.lr}) or set --clip-grad; {name_last_checkpoint(session)}; "
        f"training images of that batch, by index: {' '.join(map(str, samples))}"
    )

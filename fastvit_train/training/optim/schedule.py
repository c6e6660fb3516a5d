"""The learning rate schedule, by its name in timm; --extend begins it again."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from fastvit_train.config.schema import OptimConfig
from fastvit_train.utils.errors import UserError, counted

WARMUP_START = 0.01  # of the peak learning rate


class Schedule:
    """timm's schedules of the run and of each of its extensions, one after the other.

    Do not let Accelerate prepare it: it would step once per rank.

    Args:
        optimizer: its learning rates are set.
        config: the settings; each extension has the same as the run.
        epochs: epochs of the run and of each extension.
        steps_per_epoch: optimizer steps per epoch.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: Sequence[int], steps_per_epoch: int
    ) -> None:
        self.optimizer = optimizer
        self._starts = [0, *accumulate(count * steps_per_epoch for count in epochs[:-1])]
        self._schedules = [_build(optimizer, config, count * steps_per_epoch) for count in epochs]
        self.step_update(0)

    def step_update(self, step: int) -> None:
        """Set the learning rates of the step that follows `step` optimizer steps."""
        current = bisect_right(self._starts, step) - 1
        self._schedules[current].step_update(step - self._starts[current])


def _build(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Scheduler:
    """Build timm's schedule of `steps` optimizer steps; UserError if they are too few for it."""
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="poly" if config.schedule == "linear" else config.schedule,
            num_epochs=steps,
            decay_rate=1.0 if config.schedule == "linear" else 0.1,
            warmup_epochs=round(config.warmup * steps),
            warmup_lr=config.lr * WARMUP_START,
            step_on_epochs=False,
            updates_per_epoch=1,  # so that everything above counts in optimizer steps
        )
    except ValueError as error:
        raise UserError(
            f"--schedule {config.schedule} is not possible in {counted(steps, 'step')} ({error}); train for more epochs"
        ) from None
    return scheduler

"""All that a training run holds while it trains; and how several runs take turns."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import EvalLoader, TrainLoader
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.runs.log import Log, MetricsBuffer
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.optim.loss import Loss
from fastvit_train.training.optim.schedule import Schedule
from fastvit_train.training.preemption import StatusExchange, StopSignalHandler
from fastvit_train.utils.errors import Interrupted, Preempted, counted
from fastvit_train.utils.gpu_monitor import Meter
from fastvit_train.utils.machine import OtherProcesses
from fastvit_train.utils.timing import SlowdownDetector

if TYPE_CHECKING:
    from fastvit_train.training.graphed_step import GraphedStep

Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainSession:
    """A run that is ready to train; `close` releases what setting it up has opened or changed."""

    config: ResolvedConfig
    folder: RunFolder
    log: Log
    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: Schedule
    dataset: DatasetSpec
    train_loader: TrainLoader
    eval_loader: EvalLoader
    loss: Loss
    batch_size: int
    """images per optimizer step, over all ranks"""
    state: TrainState
    compile_seconds: float | None
    """seconds that the first passes took before the first step; None if nothing is compiled"""
    meter: Meter
    status_exchange: StatusExchange
    metrics_buffer: MetricsBuffer
    ema: ModelEmaV3 | None
    average: AveragedModel | None
    """of the weights after the last epochs, as far as they are completed"""
    slowdown: SlowdownDetector
    other_processes: OtherProcesses
    graphed_step: "GraphedStep | None"
    """the recorded training step of a compiled run on GPUs"""
    resources: ExitStack
    """the lock of the run's folder, threads and switches to restore"""

    @property
    def bare_model(self) -> nn.Module:
        """The model without Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved at the end: the trained one, or the moving average of its weights."""
        return self.model if self.ema is None else self.ema.module

    def close(self) -> None:
        """Release the run's folder and restore what `setup` changed in this process."""
        self.resources.close()


def take_turns(
    runs: Sequence[Generator[None, None, Result]], random_states: RandomStates, stop_signals: StopSignalHandler
) -> list[Result]:
    """Advance each of `runs` to its next yield, in rounds, until they end; all end in the same round.

    Args:
        runs: they yield equally often.
        random_states: those of the runs.
        stop_signals: what it reports does not change during a round, so that all runs stop in the same one.

    Returns:
        The result of each run.

    Raises:
        Preempted, Interrupted: after a signal, when all runs have stopped.
    """
    while True:
        results: list[Result] = []
        stops: list[Preempted | Interrupted] = []
        with stop_signals.hold() if len(runs) > 1 else nullcontext():
            for index, run in enumerate(runs):
                random_states.switch_to(index)
                try:
                    next(run)
                except StopIteration as end:
                    results.append(end.value)
                except (Preempted, Interrupted) as stop:
                    stops.append(stop)
        if stops:
            others = f"; so do the runs of {counted(len(stops) - 1, 'other seed')}" if len(stops) > 1 else ""
            raise type(stops[0])(f"{stops[0]}{others}") from None
        if results:
            return results

"""All that a training run holds while it trains."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import EvalLoader, TrainLoader
from fastvit_train.runs.log import Log, MetricsBuffer
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.preemption import StatusExchange
from fastvit_train.utils.gpu_monitor import Meter
from fastvit_train.utils.timing import SlowdownDetector

if TYPE_CHECKING:
    from fastvit_train.training.graphed_step import GraphedStep


@dataclass(frozen=True)
class TrainSession:
    """A run that is ready to train; `close` releases what setting it up has opened or changed."""

    config: ResolvedConfig
    folder: RunFolder
    log: Log
    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler
    dataset: DatasetSpec
    train_loader: TrainLoader
    eval_loader: EvalLoader
    batch_size: int
    """images per optimizer step, over all ranks"""
    state: TrainState
    compile_seconds: float | None
    """seconds that the first passes took before the first step; None if nothing is compiled"""
    meter: Meter
    status_exchange: StatusExchange
    metrics_buffer: MetricsBuffer
    ema: ModelEmaV3 | None
    slowdown: SlowdownDetector
    graphed_step: "GraphedStep | None"
    """the recorded training step of a compiled run on one GPU"""
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

"""All that a training run holds while it trains."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import EvalLoader, TrainLoader
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.log import Journal, Log
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.preemption import Watch
from fastvit_train.utils.gpu_monitor import Meter


@dataclass(frozen=True)
class TrainSession:
    """A run, ready to train."""

    config: TrainConfig
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
    progress: TrainState
    compile_seconds: float | None
    """spent on first passes before the first step; None where nothing is compiled"""
    meter: Meter
    watch: Watch
    journal: Journal
    ema: ModelEmaV3 | None
    lock: RunLock | None
    """on the first process"""

    @property
    def bare_model(self) -> nn.Module:
        """The model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated and written at the end: the model, or the moving average of its weights."""
        return self.model if self.ema is None else self.ema.module

"""The settings of a run, with every value filled in that the user left open."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvit_train.config.input_size import InputSize
from fastvit_train.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class ResolvedConfig:
    """A `TrainConfig` with all sizes filled in. `models.resolve.resolve` makes it once per run, for all other code."""

    settings: TrainConfig
    """the settings as config.yaml records them, with the resolved run name, image size, attention and, with
    --fit-memory, the batches that fit"""
    run_dir: Path
    """the run's folder"""
    input_size: InputSize
    """channels, height and width of the model's input"""
    num_classes: int
    """number of the model's outputs"""
    mean: tuple[float, ...]
    """mean of each channel, for pixels from 0 to 1; it is subtracted from the input"""
    std: tuple[float, ...]
    """standard deviation of each channel, for pixels from 0 to 1; the input is divided by it"""
    last_epoch: int
    """epoch after which this process stops training"""

    @property
    def run(self) -> RunConfig:
        return self.settings.run

    @property
    def model(self) -> ModelConfig:
        return self.settings.model

    @property
    def data(self) -> DataConfig:
        return self.settings.data

    @property
    def optim(self) -> OptimConfig:
        return self.settings.optim

    def with_name(self, exp_name: str) -> "ResolvedConfig":
        """Return the same configuration for a run of another name."""
        run = replace(self.run, exp_name=exp_name)
        return replace(self, settings=replace(self.settings, run=run), run_dir=Path(run.runs_dir) / exp_name)

    def with_batches(self, grad_accum: int, eval_batch_size: int) -> "ResolvedConfig":
        """Return the same configuration with other numbers of micro-batches and of images per evaluation step."""
        run, optim = replace(self.run, eval_batch_size=eval_batch_size), replace(self.optim, grad_accum=grad_accum)
        return replace(self, settings=replace(self.settings, run=run, optim=optim))

    def with_model(self, **changes: Any) -> "ResolvedConfig":
        """Return the same configuration with other settings of the model, such as its attention."""
        return replace(self, settings=replace(self.settings, model=replace(self.model, **changes)))

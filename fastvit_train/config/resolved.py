"""The settings of a run, with every value filled in that the user left open."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastvit_train.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

LUMA = (0.299, 0.587, 0.114)
"""shares of red, green and blue in a gray level (ITU-R BT.601)"""


class InputSize(NamedTuple):
    """Channels, and height and width in pixels, of the images that a model takes; one channel holds gray levels."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, channels: int, image_size: str | int) -> Self:
        """Return the size that the settings `in_chans` and `image_size` describe: a side, or HEIGHTxWIDTH."""
        height, _, width = str(image_size).partition("x")
        return cls(channels, int(height), int(width or height))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def image_size(self) -> str | int:
        """Height and width as the setting `image_size` holds them."""
        return self.height if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def nbytes(self) -> int:
        """Bytes of an image as uint8."""
        return math.prod(self)

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return a mean or standard deviation of the channels of color images for gray ones, or the other way around.

    The standard deviation of gray levels is estimated.
    """
    if len(set(values)) == 1:
        return values[:1] * channels
    if channels == 1 and len(values) == len(LUMA):
        return (sum(share * value for share, value in zip(LUMA, values, strict=True)),)
    return values


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

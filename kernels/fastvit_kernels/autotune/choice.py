"""What `auto` chooses between: a case, the times of the implementations in it, and the rule that takes one of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from fastvit_kernels.registry import IMPLEMENTATIONS

PARTS = 3
"""parts of the rounds, each of which has to show that an implementation is faster"""
MIN_GAIN = 1.1
"""an implementation that is less than this factor faster does not replace one that is preferred to it"""

Mode = Literal["eager", "compiled", "traced"]
"""how the calls run: one by one; inside a model that will be compiled; or inside a graph that torch.compile is tracing
at this moment, when nothing else can be compiled"""


@dataclass(frozen=True)
class Case:
    """The properties of a call that its speed depends on."""

    shape: tuple[int, int, int]
    num_heads: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    has_bias: bool
    dropout_p: float
    device: torch.device
    autocast: torch.dtype | None
    mode: Mode

    def __str__(self) -> str:
        autocast = "" if self.autocast is None else f" under autocast to {_dtype_name(self.autocast)}"
        sizes = "x".join(map(str, self.shape))
        mode = "" if self.mode == "eager" else f", {self.mode}"
        return f"{sizes}, {self.num_heads} heads, {_dtype_name(self.dtype)}{autocast}, {self.device.type}{mode}"

    @property
    def is_graphed(self) -> bool:
        """Whether only the time on the device counts, because the calls are launched as a CUDA graph."""
        return self.mode != "eager" and self.device.type == "cuda"


@dataclass(frozen=True)
class Choice:
    """The measurements for one case, and the implementation that follows from them."""

    case: str
    """shape, heads, dtype and device, for messages"""
    samples: dict[str, tuple[float, ...]]
    """for each implementation, milliseconds of one forward and backward pass: the fastest round of each of
    `PARTS` parts of the rounds"""
    compile_seconds: float
    """time of the first calls of implementations that compile kernels"""
    unsupported: dict[str, str] = field(default_factory=dict)
    """implementations that do not support this case, each with the reason"""
    failed: dict[str, str] = field(default_factory=dict)
    """implementations that raised an error or computed something else, each with the reason"""
    file: Path | None = None
    """the file that the measurements were read from, if an earlier process made them"""

    @cached_property
    def name(self) -> str:
        """The implementation to use."""
        return preferred(self.samples)

    @property
    def milliseconds(self) -> dict[str, float]:
        """The time of the fastest round, by implementation."""
        return {name: min(values) for name, values in self.samples.items()}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {_plain(ms)}" for name, ms in self.milliseconds.items())
        compiled = f"compilation took {self.compile_seconds:.1f} s"
        source = compiled if self.file is None else f"measured before, in {self.file}"
        left_out = "".join(f"; left out {name}: {why}" for name, why in (self.unsupported | self.failed).items())
        measured = f"ms per forward and backward pass at {self.case}: {times}"
        return f"attention auto: {self.name}; {measured} ({source}){left_out}"


def _plain(ms: float) -> str:
    """Format a time with three significant digits and without an exponent, as in 1,710 or 0.0123."""
    digits = 2 - math.floor(math.log10(ms)) if ms > 0 else 0
    return f"{round(ms, digits):,.{max(0, digits)}f}"


def preferred(samples: Mapping[str, Sequence[float]]) -> str:
    """Return the implementation to use: the most preferred one, unless another is clearly faster.

    The later an implementation stands in the registry, the more it is preferred. Another one replaces it only if it is
    faster by the factor `MIN_GAIN` in each sample. Thus noise does not decide between implementations of equal speed.

    Args:
        samples: for each implementation its times, the fastest round of each part of the rounds. Other processes can
            only slow a round down, so the fastest is the one that they disturbed least.
    """

    def is_slower(name: str) -> bool:
        return any(
            all(other * MIN_GAIN <= own for other, own in zip(others, samples[name], strict=True))
            for others in samples.values()
        )

    order = [*(name for name in reversed(IMPLEMENTATIONS) if name in samples), *samples]
    return next(name for name in order if not is_slower(name))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

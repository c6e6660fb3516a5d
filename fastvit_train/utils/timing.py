"""Wall-clock timing: calls in interleaved rounds, and the median and quartiles of their seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Quartiles(NamedTuple):
    """The first quartile, the median and the third quartile."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Compute the quartiles of one or more values; all three quartiles of a single value are that value.

    Between two values they are interpolated linearly, so they never lie outside the range of `values`.
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, method="inclusive"))


class SlowdownDetector:
    """Detects, once, that steps take several times as long as in the fastest epoch so far."""

    FACTOR = 3
    MIN_SECONDS = 2.0
    """Shorter epochs say too little."""

    def __init__(self) -> None:
        self._fastest = float("inf")
        self._reported = False

    def factor(self, seconds: float, steps: int) -> float | None:
        """Return how many times slower an epoch is than the fastest one, the first time that it is `FACTOR` or more."""
        if seconds < self.MIN_SECONDS:
            return None
        self._fastest = min(self._fastest, seconds / steps)
        factor = seconds / steps / self._fastest
        if self._reported or factor < self.FACTOR:
            return None
        self._reported = True
        return factor


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; on a CPU there is nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_call(run: Callable[[], object], device: torch.device | None = None, calls: int = 1) -> float:
    """Measure the seconds that `calls` calls of `run` take, until the device has finished them.

    A GPU call of some microseconds would be dominated by the synchronisation, so time several calls at once.

    Args:
        device: the device to wait for; None if `run` itself waits for the device.
    """
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if device is not None:
        synchronize(device)
    return time.perf_counter() - started


def time_in_rounds(
    runs: Sequence[Callable[[], object]], rounds: int, device: torch.device | None = None, calls: int = 1
) -> list[list[float]]:
    """Time `calls` calls of each of `runs` in every round, so that a slow moment of the machine affects all alike.

    Returns:
        For each of `runs` the seconds of its `calls` calls, one value per round; see `time_call` for `device`.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, values in zip(runs, times, strict=True):
            values.append(time_call(run, device, calls))
    return times

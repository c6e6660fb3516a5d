"""The cost of reading the GPU's state ten times per second: training steps with and without, and the thread's time.

Without a GPU the thread reads a fake NVML whose calls take half a millisecond, like those of a driver.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from bench.benchmark_case import BenchmarkCase, Workload, device
from bench.compare import NOTCH
from bench.suites.bench_step import Training
from fastvit_train.utils import gpu_monitor
from fastvit_train.utils.gpu_monitor import GpuId, Meter, Usage
from fastvit_train.utils.timing import quartiles, synchronize, time_in_rounds

OPERATION = "telemetry's cost"
MODEL, BATCH = "mc_vit_4_4_32", 64
STEPS = {"cpu": 40, "cuda": 1000}
"""training steps per call, about a second"""
DRIVER_SECONDS = 0.0005
MAX_COST = 0.005
"""largest allowed loss of throughput, and share of one core for the thread"""
CHECKED_SECONDS = 2.0
PAIRS = 16
"""measurements with and without telemetry, interleaved"""


class FakeNvml:
    """The functions of nvidia-ml-py that the meter calls; each sleeps as long as a driver's call takes."""

    NVMLError = OSError

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            time.sleep(DRIVER_SECONDS)
            return {
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=50),
                "nvmlDeviceIsMigDeviceHandle": 0,
                "nvmlDeviceGetMigMode": [0, 0],
            }.get(name, 1000)

        return call


class TimedMeter(Meter):
    """A meter that also measures its thread's share of the time of one core."""

    thread_seconds, metered_seconds = 0.0, 0.0

    def _keep_sampling(self) -> None:
        super()._keep_sampling()
        self.thread_seconds += time.thread_time()

    def stop(self) -> Usage:
        usage = super().stop()
        self.metered_seconds += usage.seconds
        return usage

    @property
    def thread_share(self) -> float:
        return self.thread_seconds / self.metered_seconds


def make_meter(enabled: bool) -> TimedMeter:
    """Return a meter that reads this machine's GPU, or the fake NVML if there is none."""
    if device().type == "cuda" or not enabled:
        return TimedMeter(device(), enabled)
    with (
        mock.patch.dict(sys.modules, pynvml=FakeNvml()),
        mock.patch.object(gpu_monitor, "identify_gpu", return_value=GpuId("fake", None)),
    ):
        return TimedMeter(device())


def build(enabled: bool, batch: int) -> Workload:
    training = Training(MODEL, "fused", False, "bf16", batch)
    meters, usages = {on: make_meter(on) for on in (False, True)}, list[Usage]()

    def steps(timed_meter: TimedMeter) -> Usage:
        timed_meter.start()
        for _ in range(STEPS[device().type]):
            training.step()
        synchronize(device())
        return timed_meter.stop()

    def run() -> None:
        usages.append(steps(meters[enabled]))

    def check() -> None:
        assert (usages[-1].joules is not None) == enabled, usages[-1].unmeasured
        timed_meter = make_meter(enabled)
        timed_meter.start()
        end = time.perf_counter() + CHECKED_SECONDS
        while time.perf_counter() < end:
            training.step()
        timed_meter.stop()
        assert timed_meter.thread_share < MAX_COST, (
            f"the thread takes {timed_meter.thread_share:.2%} of a core, allowed {MAX_COST:.1%}"
        )

    def cost() -> dict[str, float]:
        """Measure the loss of throughput; fail if it exceeds `MAX_COST` by more than the uncertainty."""
        times = time_in_rounds([partial(steps, meters[on]) for on in (True, False)], PAIRS)
        low, middle, high = quartiles([on / off - 1 for on, off in zip(*times, strict=True)])
        uncertainty = NOTCH * (high - low) / PAIRS**0.5
        assert middle - uncertainty < MAX_COST, f"it costs {middle:.2%} ± {uncertainty:.2%} of throughput"
        return {"throughput_cost": middle, "uncertainty": uncertainty, "thread_share": meters[True].thread_share}

    return Workload(run, check, batch * STEPS[device().type], extra=cost if enabled else dict)


def cases() -> Iterator[BenchmarkCase]:
    for name, enabled in (("without", False), ("with", True)):
        yield BenchmarkCase(
            OPERATION, f"{MODEL} B{BATCH}", "bf16", name, BATCH, partial(build, enabled), quick_check=enabled
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_telemetry(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

"""What reading the GPU ten times a second costs a training: its steps with and without, and the thread's own time.

Without a GPU the thread reads a stand-in for NVML, each of whose calls takes half a millisecond, as a driver's do.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from bench.bench_step import Training
from bench.case import Case, Work, device
from bench.compare import NOTCH
from fastvit_train.utils import gpu_monitor
from fastvit_train.utils.gpu_monitor import GpuId, Meter, Usage
from fastvit_train.utils.timing import quartiles, synchronize, time_in_rounds

WHAT = "telemetry's cost"
MODEL, BATCH = "mc_vit_4_4_32", 64
STEPS = {"cpu": 40, "cuda": 1000}
"""per call: about a second of training, a short epoch"""
DRIVER_SECONDS = 0.0005
MAX_COST = 0.005
"""share of throughput that sampling may cost"""
CHECKED_SECONDS = 2.0
PAIRS = 16
"""of some steps with and without"""


class StandIn:
    """The functions of nvidia-ml-py that the meter calls; each takes a driver's time, without the interpreter."""

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
    """A meter that knows which share of one core's time its thread has worked for."""

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


def meter(enabled: bool) -> TimedMeter:
    """One that reads this machine's GPU, or the stand-in."""
    if device().type == "cuda" or not enabled:
        return TimedMeter(device(), enabled)
    with (
        mock.patch.dict(sys.modules, pynvml=StandIn()),
        mock.patch.object(gpu_monitor, "identify_gpu", return_value=GpuId("stand-in", None)),
    ):
        return TimedMeter(device())


def build(enabled: bool, batch: int) -> Work:
    training = Training(MODEL, "fused", False, "bf16", batch)
    watches, usages = {on: meter(on) for on in (False, True)}, list[Usage]()

    def steps(watch: TimedMeter) -> Usage:
        watch.start()
        for _ in range(STEPS[device().type]):
            training.step()
        synchronize(device())
        return watch.stop()

    def run() -> None:
        usages.append(steps(watches[enabled]))

    def check() -> None:
        assert (usages[-1].energy_joules is not None) == enabled, usages[-1].unmeasured
        watch = meter(enabled)
        watch.start()
        end = time.perf_counter() + CHECKED_SECONDS
        while time.perf_counter() < end:
            training.step()
        watch.stop()
        assert watch.thread_share < MAX_COST, (
            f"the thread takes {watch.thread_share:.2%} of a core, allowed {MAX_COST:.1%}"
        )

    def cost() -> dict[str, float]:
        """Measure the share of throughput that it costs, in interleaved pairs; fails if the cost exceeds MAX_COST."""
        times = time_in_rounds([partial(steps, watches[on]) for on in (True, False)], PAIRS)
        low, middle, high = quartiles([on / off - 1 for on, off in zip(*times, strict=True)])
        uncertainty = NOTCH * (high - low) / PAIRS**0.5
        assert middle - uncertainty < MAX_COST, f"it costs {middle:.2%} ± {uncertainty:.2%} of throughput"
        return {"throughput_cost": middle, "uncertainty": uncertainty, "thread_share": watches[True].thread_share}

    return Work(run, check, batch * STEPS[device().type], extra=cost if enabled else dict)


def cases() -> Iterator[Case]:
    for name, enabled in (("without", False), ("with", True)):
        yield Case(WHAT, f"{MODEL} B{BATCH}", "bf16", name, BATCH, partial(build, enabled))


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_telemetry(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

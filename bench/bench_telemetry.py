"""What reading the GPU ten times a second costs a training: its steps with and without, and the thread's own time.

Without a GPU the thread reads a stand-in for NVML, each of whose calls waits as long as a slow card's driver does.
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
from fastvit_train import telemetry
from fastvit_train.telemetry import Gpu, Meter, Usage

WHAT = "telemetry's cost"
MODEL, BATCH = "mc_vit_4_4_32", 64
STEPS = {"cpu": 20, "cuda": 400}
"""per call: some seconds of training"""
DRIVER_SECONDS = 0.002
MOST = 0.005
"""of the time that the thread may take"""


class SlowDriver:
    """The functions of nvidia-ml-py that the meter calls, each as slow as a driver's, letting go of the interpreter."""

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
    """A meter that knows how long its thread has worked for, in all."""

    thread_seconds = 0.0

    def _keep_sampling(self) -> None:
        super()._keep_sampling()
        self.thread_seconds += time.thread_time()


def meter(enabled: bool) -> TimedMeter:
    """One that reads this machine's GPU, or the stand-in."""
    if device().type == "cuda" or not enabled:
        return TimedMeter(device(), enabled)
    with (
        mock.patch.dict(sys.modules, pynvml=SlowDriver()),
        mock.patch.object(telemetry, "identify", return_value=Gpu("stand-in", None)),
    ):
        return TimedMeter(device())


def build(enabled: bool, batch: int) -> Work:
    training, watch, usages = Training(MODEL, "fused", False, "bf16", batch), meter(enabled), list[Usage]()

    def run() -> None:
        watch.start()
        for _ in range(STEPS[device().type]):
            training.step()
        usages.append(watch.stop())

    def share() -> float:
        return watch.thread_seconds / sum(usage.seconds for usage in usages)

    def check() -> None:
        assert (usages[-1].energy_joules is not None) == enabled, usages[-1].unmeasured
        assert share() < MOST, f"the thread takes {share():.2%} of the time, allowed {MOST:.1%}"

    images = batch * STEPS[device().type]
    return Work(run, check, images, extra=lambda: {"thread_share": share()})


def cases() -> Iterator[Case]:
    for name, enabled in (("without", False), ("with", True)):
        yield Case(WHAT, f"{MODEL} B{BATCH}", "bf16", name, BATCH, partial(build, enabled))


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_telemetry(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

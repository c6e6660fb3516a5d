"""End to end: epochs of our trainer and of the typical script on the same images, each in its own process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from bench.benchmark_case import BenchmarkCase, Workload, device
from bench.environment import ROOT

BATCH, IMAGES = 256, 4096
OPERATION = "epoch end to end"
TYPICAL = "typical script, fp32"
ROWS = {
    TYPICAL: "typical",
    "fastvit_train, fp32": "fp32",
    "fastvit_train, bf16": "bf16",
    "fastvit_train, bf16, --compile": "compiled",
}
CALLS = {"cpu": 1, "cuda": 12}
"""epochs of our trainer per timed block; the typical script has one, since it is bound by its input on any device"""
ROUNDS = 3
"""timed blocks under pytest-benchmark; the first call and the check are two epochs of warm-up before them"""
CHECK_BATCH, CHECK_HOLDOUT = 64, 0.95
"""batch size and held-out fraction when nothing is timed, which leaves few images"""


class Worker:
    """A process that trains for one epoch per request (bench/epoch_worker.py)."""

    def __init__(self, row: str, batch: int, holdout: float) -> None:
        command = [sys.executable, "-m", "bench.epoch_worker", row, str(batch), str(holdout)]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  a pipe could fill up
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8"
        )
        self.parameters = self._answer()["parameters"]
        self.losses: list[float] = []
        self.memory: dict[str, float] = {}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the worker stopped: {self._errors.read()[-2000:]}")
        return json.loads(line)

    def epoch(self) -> int:
        """Train for one epoch; return the number of images."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.losses.append(answer["loss"])
        self.memory = answer["memory"]
        return answer["images"]

    def close(self) -> None:
        self._process.communicate(timeout=60)  # closes its input, so that it exits


def build(row: str, images: int) -> Workload:
    timed = images == IMAGES
    batch, holdout = (BATCH, 0.0) if timed else (CHECK_BATCH, CHECK_HOLDOUT)
    worker = Worker(row, batch, holdout)

    def check() -> None:
        if not worker.losses:  # the first call is usually the first epoch
            worker.epoch()
        assert worker.parameters == 119_147
        assert worker.epoch() == (IMAGES if timed else CHECK_BATCH * 3)
        assert worker.losses[-1] < worker.losses[0], f"training did not lower the loss: {worker.losses}"

    return Workload(
        worker.epoch,
        check,
        IMAGES,
        calls=1 if row == "typical" else CALLS[device().type],
        rounds=ROUNDS,
        close=worker.close,
        extra=lambda: worker.memory,
    )


def cases() -> Iterator[BenchmarkCase]:
    for name, row in ROWS.items():
        shape = f"mc_vit_4_4_32, {IMAGES} images, B{BATCH}"
        yield BenchmarkCase(
            OPERATION,
            shape,
            "fp32 and bf16",
            name,
            IMAGES,
            partial(build, row),
            main=True,
            quick_check=row == "typical",
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_epoch(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

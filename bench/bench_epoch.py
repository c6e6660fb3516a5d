"""End to end: epochs of our trainer and of the typical script on the same images, in turn, one process for each."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from bench.case import Case, Work, device
from bench.environment import ROOT

BATCH, IMAGES = 256, 4096
WHAT = "epoch end to end"
TYPICAL = "typical script, fp32"
ROWS = {
    TYPICAL: "typical",
    "fastvit_train, fp32": "fp32",
    "fastvit_train, bf16": "bf16",
    "fastvit_train, bf16, --compile": "compiled",
}
OTHER = {"typical": "bf16", "fp32": "typical", "bf16": "typical", "compiled": "typical"}
CALLS = {"cpu": 1, "cuda": 12}
CHECK_BATCH, CHECK_HOLDOUT = 64, 0.95
"""where nothing is timed, most images are left out"""


class Worker:
    """A process that trains an epoch when it is called (bench/epoch_worker.py)."""

    def __init__(self, row: str, batch: int, holdout: float) -> None:
        command = [sys.executable, "-m", "bench.epoch_worker", row, str(batch), str(holdout)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe would fill up
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self.parameters = self._answer()["parameters"]
        self.losses: list[float] = []
        self.memory: dict[str, float] = {}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"the worker died: {self._said.read()[-2000:]}")
        return json.loads(line)

    def epoch(self) -> int:
        """Train for an epoch; returns the number of images."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.losses.append(answer["loss"])
        self.memory = answer["memory"]
        return answer["images"]

    def close(self) -> None:
        self._process.communicate(timeout=60)  # closes its input, which ends it


def build(row: str, images: int) -> Work:
    timed = images == IMAGES
    batch, holdout = (BATCH, 0.0) if timed else (CHECK_BATCH, CHECK_HOLDOUT)
    worker = Worker(row, batch, holdout)
    others: list[Worker] = []

    def other() -> None:
        if not others:
            others.append(Worker(OTHER[row], batch, holdout))
        others[0].epoch()

    def check() -> None:
        seen = [worker.epoch() for _ in range(2)]
        assert worker.parameters == 119_147
        assert set(seen) == {IMAGES if timed else CHECK_BATCH * 3}
        assert worker.losses[-1] < worker.losses[0], f"epochs of training did not lower the loss: {worker.losses}"

    def close() -> None:
        for each in (worker, *others):
            each.close()

    return Work(
        worker.epoch,
        check,
        IMAGES,
        calls=CALLS[device().type],
        alternate=other,
        close=close,
        extra=lambda: worker.memory,
    )


def cases() -> Iterator[Case]:
    for name, row in ROWS.items():
        shape = f"mc_vit_4_4_32, {IMAGES} images, B{BATCH}"
        slow = row == "compiled"
        yield Case(WHAT, shape, "fp32 and bf16", name, IMAGES, partial(build, row), slow_check=slow)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_epoch(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

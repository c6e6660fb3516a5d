"""train() leaves the process as it found it, whether the run ends or fails: it may be called from a notebook, twice."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.cpu_threads import all_cores
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.training import metrics
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError

SmallConfig = Callable[..., TrainConfig]


def process_state() -> dict[str, object]:
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return {
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "handlers": [
            signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)
        ],
        "wakeup": wakeup,
        "environment": dict(os.environ),
        "random states": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "algorithms": (
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        ),
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name in ("signals", "nvml")),
    }


@pytest.fixture
def other_threads():
    """A number of threads that no run would choose by itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_all_cores_restores_the_threads(other_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 1)
    with pytest.raises(ZeroDivisionError), all_cores() as words:
        assert torch.get_num_threads() == 1
        assert words == "1 CPU thread per process (1 core, 1 local process)"
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_process_as_it_found_it(
    small_config: SmallConfig, other_threads: None, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    during: list[int] = []
    record_epoch = metrics.record_epoch

    def fail_or_record(*args: Any) -> dict[str, Any]:
        during.append(torch.get_num_threads())
        if fails:
            raise UserError("the disk is full")
        return record_epoch(*args)

    monkeypatch.setattr(metrics, "record_epoch", fail_or_record)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12)
    before = process_state()
    config = small_config(epochs=1, deterministic=True)
    if fails:
        with pytest.raises(UserError, match="the disk is full"):
            fit(config)
    else:
        fit(config)
    assert process_state() == before
    assert len(during) == 1


@pytest.mark.slow
def test_the_callers_random_numbers_go_on(small_config: SmallConfig, tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])
    fit(small_config(epochs=1))
    evaluate_run(tmp_path / "runs" / "run")
    assert draw() == expected

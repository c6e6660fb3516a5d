"""What the ranks exchange a few times a second, and what the training loop counts between two exchanges."""

import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.accelerator import start_accelerator
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import preemption
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.loop import fit, train_epoch
from fastvit_train.training.preemption import INTERVAL, StatusExchange, StopSignalHandler, StopTraining
from fastvit_train.training.setup import setup
from fastvit_train.utils.errors import UserError

SmallConfig = Callable[..., TrainConfig]


class Clock:
    """A clock that stands still between steps, each of which takes `step` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(preemption.time, "perf_counter", lambda: self.now)


def status_exchange(processes: int = 1, request: StopSignalHandler | None = None) -> StatusExchange:
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes)
    return StatusExchange(accelerator, request or StopSignalHandler())  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.0005, 0.01, 0.1, 3.0])
def test_the_exchanges_are_a_quarter_of_a_second_apart_whatever_a_step_takes(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, at = Clock(monkeypatch), []
    two = status_exchange(processes=2)

    def gather(statuses: list[torch.Tensor], status: torch.Tensor) -> None:
        at.append(clock.now)
        for row in statuses:
            row.copy_(status)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    for _ in range(round(20 / step)):
        clock.now += step
        assert two.after_batch()
    gaps = [after - before for before, after in pairwise(at)]
    assert max(gaps) <= max(INTERVAL, step) + 1e-9
    settled = gaps[len(gaps) // 2 :]
    assert min(settled) >= min(INTERVAL, step) * 0.9 and len(at) <= 20 / max(INTERVAL, step) * 2 + 12


def test_a_process_alone_stops_after_the_step_and_others_agree_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopSignalHandler()
    alone = status_exchange(request=request)
    assert alone.after_batch()
    request.received = signal.SIGUSR1
    with pytest.raises(StopTraining, match="SIGUSR1"):
        alone.after_batch()

    other_ranks(monkeypatch, [signal.SIGTERM, 0, 1])
    with pytest.raises(StopTraining, match="SIGTERM"):
        status_exchange(processes=2).after_batch()


def other_ranks(monkeypatch: pytest.MonkeyPatch, *others: list[int]) -> None:
    """Let the other ranks report a signal, non-finite losses, and the batches until their next exchange."""

    def gather(statuses: list[torch.Tensor], status: torch.Tensor) -> None:
        for row, other in zip(statuses, [status, *map(torch.tensor, others)], strict=True):
            row.copy_(other)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)


def test_the_ranks_act_on_the_loss_of_any_rank_and_on_the_smallest_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)  # a batch takes no time: this rank would wait for twice as many batches each time
    exchange, asked = status_exchange(processes=3), []

    def is_nonfinite() -> torch.Tensor:
        asked.append(True)
        return torch.tensor(False)

    other_ranks(monkeypatch, [0, 0, 9], [0, 0, 2])
    assert exchange.after_batch(is_nonfinite) and exchange.after_batch(is_nonfinite) and len(asked) == 1
    other_ranks(monkeypatch, [0, 1, 9], [0, 0, 9])
    assert not exchange.after_batch(is_nonfinite) and len(asked) == 2
    # This rank's own 4 batches are the fewest now: it waits for twice the 2 batches that it has just trained.
    assert [exchange.after_batch(is_nonfinite) for _ in range(4)] == [True, True, True, False] and len(asked) == 3


def test_signals_are_taken_while_a_run_lasts_and_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignalHandler() as request:
        signal.raise_signal(signal.SIGUSR1)
        assert request.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.slow
def test_ctrl_c_raises_keyboard_interrupt_in_python_once_the_checkpoint_is_written(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = AcceleratedOptimizer.step, 0
    before = signal.getsignal(signal.SIGINT)  # ignored in a process that a script started in the background

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        step(*args)  # type: ignore[arg-type]
        if calls == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AcceleratedOptimizer, "step", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT at step 3; the last good checkpoint is \S+step_3, ") as caught:
        fit(small_config())
    assert len(caught.traceback) <= 4 and caught.value.__suppress_context__
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert fit(small_config(), resume="must")["epochs"] == 3


def test_the_death_of_the_launcher_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([10, 1, 1, 1])
    monkeypatch.setattr(preemption.env, "launcher_command", lambda: ["accelerate"])
    monkeypatch.setattr(preemption.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(preemption, "signal_when_parent_dies", lambda number: None)
    with StopSignalHandler() as request:
        long_ago = -1000.0
        assert request._is_echo(long_ago) and not request._is_echo(long_ago)
        assert request._is_echo(time.monotonic())


def test_a_run_in_another_thread_leaves_signals_alone(small_config: SmallConfig) -> None:
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(fit(small_config(epochs=1))))
    thread.start()
    thread.join()
    assert summaries[0]["epochs"] == 1


def test_a_loss_that_is_no_number_ends_the_epoch_early(
    small_config: SmallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps go on until the next exchange, not to the epoch's end; no checkpoint is written of it."""
    session = setup(small_config(batch_size=10, save_every=50), "never", overwrite=False)
    cross_entropy, calls = torch.nn.functional.cross_entropy, 0

    def spoilt(*args: torch.Tensor, **kwargs: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        time.sleep(0.01)
        return cross_entropy(*args, **kwargs) * (float("inf") if calls == 20 else 1)

    monkeypatch.setattr(F, "cross_entropy", spoilt)
    with pytest.raises(UserError, match=r"became inf at step 20 \(epoch 1, learning rate 0\.\d+\)") as caught:
        train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
    assert calls < 20 + 2 * INTERVAL / 0.01 + 5 < session.train_loader.steps_per_epoch
    named = [int(word) for word in str(caught.value).rpartition(": ")[2].split()]
    assert named == session.train_loader.sample_order(0)[19].flatten().tolist()
    assert not list(session.folder.checkpoints.glob("step_*"))


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_not_saved(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may come about in the very step before a checkpoint: no loss has shown it yet."""
    step, calls = AcceleratedOptimizer.step, 0

    def spoilt(optimizer: AcceleratedOptimizer, *args: object) -> None:
        nonlocal calls
        calls += 1
        step(optimizer, *args)
        if calls == 10:  # the second epoch's last
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(AcceleratedOptimizer, "step", spoilt)
    message = r"is NaN or inf after step 10 \(epoch \d\); .*; the last good checkpoint is \S+step_5"
    with pytest.raises(UserError, match=message):
        fit(small_config())
    monkeypatch.undo()
    assert fit(small_config(), resume="must")["epochs"] == 3


@pytest.mark.slow
def test_the_moving_average_is_what_is_evaluated_and_written(small_config: SmallConfig, tmp_path: Path) -> None:
    decay, epochs = 0.8, 2
    summary = fit(small_config(ema=decay, epochs=epochs, batch_size=480, exp_name="averaged", save_every=1, keep=99))
    run = tmp_path / "runs" / "averaged"
    assert evaluate_run(run).evaluation.accuracy == summary["test_accuracy"]
    steps = [load_file(run / f"checkpoints/step_{step}/model.safetensors") for step in range(1, 2 * epochs + 1)]
    expected = {key: value.double() for key, value in steps[0].items()}
    for number, weights in enumerate(steps[1:], start=2):  # timm's warm-up of the decay: 1 - step ** -2/3
        rate = min(decay, 1 - number ** (-2 / 3))
        expected = {key: rate * value + (1 - rate) * weights[key].double() for key, value in expected.items()}
    written = load_file(run / "model.safetensors")
    assert all(torch.allclose(written[key].double(), value, atol=1e-6) for key, value in expected.items())
    assert not torch.equal(written["head.weight"], steps[-1]["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "nmuon", "lion"])
def test_steps_that_the_scaler_skips_are_counted_and_shown(
    small_config: SmallConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
) -> None:
    """Optimizers that skip on the device, and others, for which the scaler waits."""
    calls = iter(range(10**6))
    scale = torch.amp.GradScaler.scale

    def overflow(scaler: torch.amp.GradScaler, loss: torch.Tensor) -> torch.Tensor:
        return scale(scaler, loss * torch.inf if next(calls) in (2, 7) else loss)

    def start_with_scaler(*args: Any) -> Accelerator:
        accelerator = start_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow)
    monkeypatch.setattr("fastvit_train.training.setup.start_accelerator", start_with_scaler)
    summary = fit(small_config(stop_after=1, optimizer=optimizer))
    assert summary["skipped_steps"] == 1
    summary = fit(small_config(optimizer=optimizer), resume="must")
    assert summary["skipped_steps"] == 2 and "2 steps skipped by fp16's scaler so far" in capsys.readouterr().out
    assert [row["skipped_steps"] for row in read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")] == [1, 2, 2]

"""A training step asks the device for nothing: the host would wait for the answer."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import loop
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.loop import fit, train_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from fastvit_train.utils.timing import SlowdownDetector
from fastvit_train.utils.torch_private import TorchDispatchMode

Config = Callable[..., TrainConfig]


class HostReads(TorchDispatchMode):
    """Counts the operators whose answer the host waits for, by the part of the step."""

    OPERATORS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.part = "outside"
        self.steps = 0
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[self.part] += func in self.OPERATORS
        return func(*args, **(kwargs or {}))

    @contextmanager
    def phase(self, name: str):
        self.part = name
        yield
        self.part = "between"
        self.steps += name == "forward"


def reads(session: TrainSession) -> HostReads:
    with HostReads() as found:
        train_epoch(session, ProgressBar(session.log.console, 1, 1, 1), found.phase)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "nmuon"])
def test_no_part_of_a_step_reads_a_value_back(small_config: Config, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "clip_grad": 1.0, "label_smoothing": 0.1, "crop": "resized", "cutout": 2}
    found = reads(setup(small_config(**settings), "never", overwrite=False))
    assert found.steps == 5
    parts = ("input", "forward", "backward", "optimizer", "between")
    assert {part: found.count[part] for part in parts} == dict.fromkeys(parts, 0)
    assert found.count["waiting"] > 0  # at the epoch's end the losses are read: so reading does show


def test_a_loss_that_is_read_in_the_loop_is_seen(small_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cross_entropy = torch.nn.functional.cross_entropy

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = cross_entropy(*args, **kwargs)
        assert loss.item() > 0
        return loss

    monkeypatch.setattr(F, "cross_entropy", watched)
    found = reads(setup(small_config(), "never", overwrite=False))
    assert found.count["forward"] == found.steps


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_torch_sees_no_synchronisation_either(small_config: Config, compile: bool) -> None:
    session = setup(small_config(compile=compile, attention="triton"), "never", overwrite=False)
    bar = ProgressBar(session.log.console, 1, 1, 1)
    train_epoch(session, bar)
    session.state.close_epoch()
    modes = {"waiting": "default"}

    @contextmanager
    def phase(name: str):
        torch.cuda.set_sync_debug_mode(modes.get(name, "error"))
        yield
        torch.cuda.set_sync_debug_mode("default")

    first = iter([True])

    def after_the_first(name: str):
        return phase("waiting" if next(first, False) else name)  # the epoch's draws are moved in its first input

    train_epoch(session, bar, after_the_first)


@pytest.mark.slow
def test_on_epoch_finds_the_metrics_of_each_epoch_and_changes_nothing(small_config: Config, tmp_path: Path) -> None:
    found = []

    def on_epoch(run: Path) -> None:
        torch.rand(7)  # the dropout of the next epoch does not depend on it
        found.append(([row["epoch"] for row in read_jsonl(run / "metrics.jsonl")], (run / "summary.json").exists()))

    settings = {"drop_rate": 0.3, "epochs": 2}
    watched = fit(small_config(**settings), on_epoch=on_epoch)
    assert found == [([1], False), ([1, 2], False)]
    assert fit(small_config(**settings, exp_name="other"))["test_loss"] == watched["test_loss"]


@pytest.mark.slow
def test_a_busy_machine_is_reported_once(small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = loop._train_step
    started: list[float] = []
    pauses: list[float] = []

    def slow_from_epoch_two_on(session: TrainSession, *arguments: Any) -> None:
        if session.state.epoch == 0:
            started.append(time.perf_counter())
        else:  # relative to the first epoch's steps, which are slow themselves on a busy machine
            if not pauses:
                pauses.append(4 * (time.perf_counter() - started[0]) / len(started))
            time.sleep(pauses[0])
        train_step(session, *arguments)

    monkeypatch.setattr(loop, "_train_step", slow_from_epoch_two_on)
    monkeypatch.setattr(SlowdownDetector, "MIN_SECONDS", 0)
    fit(small_config())
    log = (tmp_path / "runs" / "run" / "train.log").read_text()
    assert log.count("times as long as in the fastest epoch: other processes seem to be using this machine") == 1

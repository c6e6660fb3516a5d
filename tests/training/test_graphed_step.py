"""The training step as one CUDA graph: it is the step of the loop, and the host only launches it."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fastvit_train.config.schema import TrainConfig
from fastvit_train.training import graphed_step, loop
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.epoch_totals import EpochTotals
from fastvit_train.training.graphed_step import GraphedStep, _unchanged, build_tables, device_step
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from tests.support import null_gpu

Config = Callable[..., TrainConfig]
Start = Callable[..., TrainSession]
SETTINGS = {
    "shift": {"crop": "shift", "flip": "alternating", "label_smoothing": 0.1, "optimizer": "nmuon", "ema": 0.9},
    "mixed": {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "rand", "color_jitter": 0.3, "random_erasing": 0.5}
    | {"sampler": "balanced", "class_weights": "auto", "optimizer": "nmuon"},
    "resized": {"crop": "resized", "cutout": 2, "optimizer": "adamw", "clip_grad": 0.1, "drop_rate": 0.1},
    "frozen": {"freeze": 2, "layer_decay": 0.75, "optimizer": "nmuon", "ema": 0.9},
}


@pytest.fixture
def start(small_config: Config) -> Iterator[Start]:
    """`start(name, **settings)` sets a run up; all are closed at the end, the last one first."""
    with ExitStack() as stack:

        def start(name: str = "run", **settings: Any) -> TrainSession:
            return stack.enter_context(closing(setup(small_config(exp_name=name, **settings), "never", False)))

        yield start


def train(session: TrainSession, epochs: int = 1) -> list[float]:
    """Train and return the losses of the steps."""
    losses = []
    for _ in range(epochs):
        train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
        losses += session.state.epoch_losses
        session.state.close_epoch()
    return losses


def with_device_step(session: TrainSession) -> TrainSession:
    """Replace the step by the function that a GPU records, without the recording."""
    tables = build_tables(session)
    return replace(session, graphed_step=GraphedStep(device_step(session, tables), tables))


def weights(session: TrainSession) -> torch.Tensor:
    """Return all weights but the pooling's bias: softmax ignores it, and AdamW follows the noise of its gradient."""
    models = [session.bare_model, *([session.ema.module] if session.ema else [])]
    named = [item for model in models for item in model.named_parameters()]
    return torch.cat([p.detach().flatten() for name, p in named if name != "attention_pool.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_recorded_function_is_the_step_of_the_loop(start: Start, settings: dict[str, Any]) -> None:
    sessions = [start("loop", **settings), start("tables", **settings)]
    torch.manual_seed(0)
    expected = train(sessions[0], epochs=2)
    torch.manual_seed(0)
    assert train(with_device_step(sessions[1]), epochs=2) == pytest.approx(expected, abs=1e-5)
    assert sessions[1].optimizer.param_groups[0]["lr"] == sessions[0].optimizer.param_groups[0]["lr"]
    assert (weights(sessions[1]) - weights(sessions[0])).abs().max() < 2e-6
    assert not torch.equal(weights(sessions[0]), weights(start("untrained", **settings)))


def test_an_epoch_goes_on_in_the_middle(start: Start) -> None:
    settings = {"optimizer": "nmuon", "crop": "shift"}
    expected = train(start("whole", **settings))
    session = with_device_step(start("halves", **settings))
    assert session.graphed_step is not None
    session.graphed_step.start_epoch(session, session.graphed_step.tables.totals)
    first = session.graphed_step.tables
    for _ in range(2):
        session.graphed_step.launch()
    state = session.state
    state.step = state.step_in_epoch = 2
    state.epoch_losses, state.epoch_correct = first.totals.losses[:2].tolist(), float(first.totals.correct)
    session.scheduler.step_update(2)
    first.totals.losses.fill_(float("nan"))  # what the rest of the epoch must not read
    assert train(session) == pytest.approx(expected, abs=1e-6)


def test_what_prepares_an_epoch_counts_as_training_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = with_device_step(start())
    start_epoch = GraphedStep.start_epoch

    def slowly(*arguments: Any) -> EpochTotals:
        time.sleep(0.5)
        return start_epoch(*arguments)

    monkeypatch.setattr(GraphedStep, "start_epoch", slowly)
    train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
    assert session.state.epoch_seconds >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trying_the_step_changes_nothing(start: Start, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    expected = train(with_device_step(start("untried", **settings)))
    torch.manual_seed(0)
    session = with_device_step(start("tried", **settings))
    assert session.graphed_step is not None
    tables, before = session.graphed_step.tables, weights(session).clone()
    tables.fill(session, tables.totals)
    session.model.train()
    with _unchanged(session, tables):
        for _ in range(3):
            session.graphed_step.launch()
        assert not torch.equal(weights(session), before)
    assert torch.equal(weights(session), before)
    torch.manual_seed(0)
    assert train(session) == expected


@pytest.mark.slow
def test_an_epoch_may_be_shorter_than_the_trials(start: Start) -> None:
    session = with_device_step(start(batch_size=1438))
    assert session.graphed_step is not None and session.train_loader.steps_per_epoch == 1
    tables = session.graphed_step.tables
    tables.fill(session, tables.totals)
    with _unchanged(session, tables):
        for _ in range(3):
            session.graphed_step.launch()
    assert len(train(session, epochs=2)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_on_a_gpu_the_graph_has_the_losses_of_the_loop(start: Start, settings: dict[str, Any]) -> None:
    settings = {**settings, "drop_rate": 0.0, "attention": "triton"}
    expected = train(start("eager", **settings), epochs=2)
    session = start("graph", compile=True, **settings)
    assert session.graphed_step is not None
    assert train(session, epochs=2) == pytest.approx(expected, abs=1e-5)


def finite(totals: EpochTotals) -> torch.Tensor:
    return torch.zeros((), dtype=torch.bool, device=totals.losses.device)


@pytest.fixture
def nan_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a null device train: it computes nothing, so losses are whatever lies in memory."""
    monkeypatch.setattr(EpochTotals, "is_nonfinite", finite)
    monkeypatch.setattr(loop, "collect_totals", lambda session, totals: torch.cuda.synchronize())


@pytest.mark.nullgpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.99, "clip_grad": 1.0},
        {"grad_checkpointing": True},
        SETTINGS["mixed"],
        {"freeze": 2, "layer_decay": 0.75},
    ],
    ids=["plain", "ema and clipping", "grad_checkpointing", "mixed", "frozen layers"],
)
def test_a_step_is_one_launch(start: Start, nan_is_fine: None, settings: dict[str, Any]) -> None:
    recipe = {"optimizer": "nmuon", "crop": "shift", "flip": "alternating", "batch_size": 256, "precision": "bf16"}
    model = {"embed_dim": 48, "depth": 4, "num_heads": 4, "patch_size": 4, "image_size": 32, "attention": "triton"}
    torch._dynamo.utils.counters.clear()
    with null_gpu.counted() as counts:
        session = start(compile=True, **{**recipe, **model, **settings})
    assert session.graphed_step is not None
    assert counts.violations == 0
    assert not torch._dynamo.utils.counters["graph_break"]
    if not settings:
        assert sum(counts.captured.values()) <= 240
    train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
    session.state.step_in_epoch = 0
    session.graphed_step.start_epoch(session, session.graphed_step.tables.totals)
    seconds = []
    with null_gpu.counted() as counts:
        for _ in range(50):
            started = time.perf_counter()
            loop._train_step(session, session.graphed_step.launch)
            seconds.append(time.perf_counter() - started)
    assert counts.calls["cudaGraphLaunch"] == 50
    assert sum(counts.launched.values()) == counts.synchronisations == counts.violations == 0
    assert statistics.median(seconds) < 0.3e-3
    print(f"nodes {sum(counts.replayed.values()) / 50}, host {statistics.median(seconds) * 1e3:.3f} ms")


@pytest.mark.nullgpu
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"grad_accum": 2}, "--grad-accum takes several passes per step"),
        ({"optimizer": "lion"}, "optimizer lion needs the host; muon, nmuon, adam and adamw do not"),
    ],
    ids=["accumulation", "lion"],
)
def test_a_step_that_cannot_be_recorded_says_why(
    start: Start, nan_is_fine: None, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], reason: str
) -> None:
    session = start(compile=True, **settings)
    assert session.graphed_step is None
    assert f"the step is compiled, but not launched as one CUDA graph: {reason}" in capsys.readouterr().out
    train(session)


@pytest.mark.nullgpu
def test_a_step_that_is_not_one_graph_records_nothing_after_the_warm_up(start: Start, nan_is_fine: None) -> None:
    session = start(compile=True, optimizer="lion", precision="bf16", crop="resized", cutout=2)
    with null_gpu.counted() as counts:
        train(session)
    assert counts.calls["cudaGraphLaunch"] > 0
    assert not any("exp_kernel" in name for name in counts.launched)  # crops compute exp(), but in compiled code
    assert sum(counts.captured.values()) == 0


@pytest.mark.nullgpu
def test_a_step_that_reads_a_value_falls_back(
    start: Start, nan_is_fine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments, **kw: clip(*arguments, **kw).item())
    session = start(compile=True, clip_grad=1.0)
    assert session.graphed_step is None
    assert "not launched as one CUDA graph: CUDA error: operation not permitted" in capsys.readouterr().out
    train(session)


@pytest.mark.nullgpu
def test_a_recording_that_fails_leaves_nothing_to_compile_and_changes_nothing(
    start: Start, nan_is_fine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[torch.Tensor] = []

    def fail(step: Callable[[], None], **_: object) -> None:
        before.extend([torch.get_rng_state(), torch.cuda.get_rng_state()])
        raise RuntimeError("no")

    monkeypatch.setattr(graphed_step, "record_graph", fail)
    session = start(compile=True, optimizer="nmuon", precision="bf16", crop="resized", cutout=2, drop_rate=0.1)
    assert session.graphed_step is None and before
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
    assert not session.optimizer.state
    compiled = dict(counters["stats"])
    train(session)
    assert compiled and dict(counters["stats"]) == compiled


def test_on_a_cpu_nothing_is_recorded(start: Start) -> None:
    if not torch.cuda.is_available():
        assert start(stop_after=1).graphed_step is None

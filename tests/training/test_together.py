"""Several seeds that train at the same time: each has the bits that it has alone, and all stop together."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.runs import checkpoint
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import loop
from fastvit_train.training.loop import fit
from fastvit_train.training.preemption import StopSignalHandler
from fastvit_train.training.seeds import fit_seeds
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup_together
from fastvit_train.utils.errors import Preempted, UserError
from tests.support import null_gpu

Config = Callable[..., TrainConfig]
DRAWING = {"epochs": 2, "depth": 1, "drop_rate": 0.2, "crop": "shift", "ema": 0.9}
"""settings under which each step draws from PyTorch's random state"""


def results(runs: Path, name: str, seed: int) -> list[Any]:
    """Return what a run has learned: its weights, its losses, and the random state at its end."""
    folder = runs / f"{name}-seed{seed}"
    weights = load_file(folder / "model.safetensors")
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    progress = checkpoint.read_json(newest / checkpoint.PROGRESS_FILE)
    return [
        {key: value.tolist() for key, value in weights.items()}, read_jsonl(folder / "steps.jsonl"), progress["cpu_rng"]
    ]  # fmt: skip


@pytest.mark.slow
def test_each_seed_has_the_bits_that_it_has_alone(
    small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**DRAWING, "batch_size": 480, "save_every": 1, "seed": 3}
    alone = fit_seeds(small_config(exp_name="alone", **settings), 2)
    capsys.readouterr()
    together = fit_seeds(small_config(exp_name="both", **settings), 2, together=True)
    for seed in (3, 4):
        assert results(tmp_path / "runs", "both", seed) == results(tmp_path / "runs", "alone", seed)
    assert together["test_accuracy"] == alone["test_accuracy"] and together["seeds"] == [3, 4]
    said = capsys.readouterr().out
    assert "seed 3: the seeds take their steps in turn, not in one CUDA graph: " in said
    assert said.index("seed 4: epoch   1/2") < said.index("seed 3: epoch   2/2")
    log = (tmp_path / "runs" / "both-seed4" / "train.log").read_text()
    assert "\nepoch   2/2" in log and "2 seeds train together: seconds, energy and memory are those of all" in log


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_a_signal_stops_all_after_the_same_step_and_all_can_be_resumed(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    fit_seeds(small_config(exp_name="whole", **DRAWING), 2)
    step, calls = AcceleratedOptimizer.step, 0

    def interrupt(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        step(*arguments)
        if calls == 2 * 3 + 2:  # the second seed's fourth step, when the first seed has taken its own
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AcceleratedOptimizer, "step", interrupt)
    with pytest.raises(Preempted, match=r"SIGTERM at step 4; the last good checkpoint is \S+seed0\S+step_4, .*1 other"):
        fit_seeds(small_config(exp_name="halves", **DRAWING), 2, together=True)
    monkeypatch.undo()
    for seed in (0, 1):
        assert (tmp_path / "runs" / f"halves-seed{seed}" / "checkpoints" / "last").resolve().name == "step_4"
    fit_seeds(small_config(exp_name="halves", **DRAWING), 2, resume="must", together=together)
    for seed in (0, 1):
        assert results(tmp_path / "runs", "halves", seed) == results(tmp_path / "runs", "whole", seed)


def test_a_signal_between_the_turns_is_seen_by_all_in_the_next_round() -> None:
    with StopSignalHandler() as stop_signals:
        with stop_signals.hold():
            signal.raise_signal(signal.SIGUSR1)
            assert not stop_signals.reported
        with stop_signals.hold():
            assert stop_signals.reported == signal.SIGUSR1


def test_an_error_of_one_seed_stops_all_and_leaves_no_run_that_cannot_be_resumed(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = loop.collect_totals

    def fail(session: TrainSession, totals: Any) -> None:
        collect(session, totals)
        if session.config.run.seed == 1:
            raise UserError("the loss became nan")

    monkeypatch.setattr(loop, "collect_totals", fail)
    with pytest.raises(UserError, match="the loss became nan"):
        fit_seeds(small_config(**DRAWING), 2, together=True)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("settings", "repeat", "message"),
    [
        ({}, 1, r"--together is for several seeds; .* --repeat 5 --together"),
        ({"stream": "always"}, 2, "--together needs the images in memory"),
        ({"track": ("wandb",)}, 2, "--track wandb can follow one run at a time"),
    ],
    ids=["one seed", "streamed", "wandb"],
)
def test_what_cannot_train_together_is_refused(
    small_config: Config, tmp_path: Path, settings: dict[str, Any], repeat: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_seeds(small_config(**settings), repeat, together=True)
    assert not (tmp_path / "runs").exists()


def test_several_processes_cannot_train_seeds_together(small_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--together trains all seeds in one process; start only one"):
        fit_seeds(small_config(), 2, together=True)


@pytest.mark.slow
def test_runs_that_stand_at_different_steps_are_refused(small_config: Config, tmp_path: Path) -> None:
    fit(small_config(exp_name="run-seed0", epochs=2, stop_after=1))
    message = r"same number of steps, not 5 \(run-seed0\), 0 \(run-seed1\); leave it out to continue one by one"
    with pytest.raises(UserError, match=message):
        fit_seeds(small_config(epochs=2), 2, resume="auto", together=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-seed0"]


def test_random_states_are_those_that_each_run_would_have_alone(seed: int) -> None:
    def draws(run: int) -> list[float]:
        torch.manual_seed(seed + run)
        return torch.rand(3).tolist()

    alone, before = [draws(0), draws(1)], torch.get_rng_state()
    with RandomStates(2) as states:
        found: list[list[float]] = [[], []]
        for run in (0, 1):
            states.switch_to(run)
            torch.manual_seed(seed + run)
        for _ in range(3):
            for run in (0, 1):
                states.switch_to(run)
                found[run].append(torch.rand(()).item())
    assert found == alone
    torch.set_rng_state(before)


@pytest.fixture
def start(small_config: Config) -> Iterator[Callable[..., list[TrainSession]]]:
    """`start(seeds, **settings)` sets up runs that train together; they are closed at the end."""
    started: list[TrainSession] = []

    def start(seeds: int, **settings: Any) -> list[TrainSession]:
        config = small_config(**settings)
        runs = [replace(config.run, seed=seed, exp_name=f"{seeds}-seed{seed}") for seed in range(seeds)]
        states = RandomStates(seeds)
        started.extend(sessions := setup_together([replace(config, run=run) for run in runs], "never", False, states))
        states.switch_to(0)
        return sessions

    yield start
    for session in reversed(started):
        session.close()


def test_the_images_are_in_memory_once(start: Callable[..., list[TrainSession]]) -> None:
    first, second = start(2, depth=1)
    assert first.train_loader._images is second.train_loader._images and first.eval_loader is second.eval_loader
    assert not torch.equal(first.train_loader.sample_order(0), second.train_loader.sample_order(0))


@pytest.mark.nullgpu
@pytest.mark.parametrize("settings", [{}, {"drop_rate": 0.1, "ema": 0.99, "clip_grad": 1.0}], ids=["plain", "dropout"])
def test_a_step_of_two_seeds_is_one_launch_of_twice_the_kernels(
    start: Callable[..., list[TrainSession]], settings: dict[str, Any]
) -> None:
    recipe = {"optimizer": "nmuon", "crop": "shift", "flip": "alternating", "batch_size": 256, "precision": "bf16"}
    replayed = []
    for seeds in (1, 2):
        with null_gpu.counted() as counts:
            sessions = start(seeds, compile=True, attention="triton", **recipe, **settings)
        assert counts.violations == 0
        steps = [session.graphed_step for session in sessions if session.graphed_step is not None]
        for session, step in zip(sessions, steps, strict=True):
            step.start_epoch(session, step.tables.totals)
        with null_gpu.counted() as counts:
            for session, step in zip(sessions, steps, strict=True):
                loop._train_step(session, step.launch)
        assert counts.calls["cudaGraphLaunch"] == 1
        fills = 2 * seeds if settings else 0  # of each random state torch writes two numbers before the launch
        assert sum(counts.launched.values()) == fills and counts.synchronisations == counts.violations == 0
        replayed.append(sum(counts.replayed.values()))
    print(f"nodes of one seed {replayed[0]}, of two {replayed[1]}")
    assert abs(replayed[1] - 2 * replayed[0]) <= 0.02 * replayed[1]

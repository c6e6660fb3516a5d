"""Several seeds in one command, and the clock that stops at an accuracy."""

import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import metrics
from fastvit_train.training.loop import fit
from fastvit_train.training.seeds import fit_seeds
from fastvit_train.utils.errors import Preempted, UserError
from tests.support import launch, one_line_error


@pytest.mark.slow
def test_seeds_are_the_runs_that_they_would_be_alone(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit_seeds(small_config(seed=5, exp_name="many", target_accuracy=0.11), 3)
    alone = [fit(small_config(seed=seed, exp_name=f"alone-{seed}")) for seed in (5, 6, 7)]
    accuracies = [summary["test_accuracy"] for summary in alone]
    assert found["seeds"] == [5, 6, 7] and found["test_accuracy"]["values"] == accuracies
    assert len(set(accuracies)) > 1, "all seeds are one"
    assert found["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert found["test_accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
    assert json.loads((tmp_path / "runs" / "many-3seeds.json").read_text()) == found
    assert found["runs"] == ["many-seed5", "many-seed6", "many-seed7"]
    assert all((tmp_path / "runs" / name / "summary.json").is_file() for name in found["runs"])
    said = capsys.readouterr().out
    assert f"{found['reached_target']} of them reached 11.00%" in said
    assert f"{found['test_accuracy']['mean']:.2%}" in said
    runs = " ".join(str(tmp_path / "runs" / name) for name in found["runs"])
    assert f"many-3seeds.json; next: fastvit compare {runs}\n" in said


@pytest.mark.slow
def test_the_clock_stops_at_the_first_evaluation_that_reaches_the_target(
    small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    fit(small_config(exp_name="free", epochs=4))
    rows = read_jsonl(tmp_path / "runs" / "free" / "metrics.jsonl")
    target = max(row["test_accuracy"] for row in rows)
    first = next(row["epoch"] for row in rows if row["test_accuracy"] >= target)
    assert first > 1, "nothing was learned after the first epoch"
    summary = fit(small_config(exp_name="timed", epochs=4, target_accuracy=target))
    rows = read_jsonl(tmp_path / "runs" / "timed" / "metrics.jsonl")
    assert summary["epochs_to_target"] == first and summary["epochs"] == 4
    clock = sum(row["seconds"] + row["eval_seconds"] for row in rows[:first])
    assert summary["seconds_to_target"] == pytest.approx(clock)
    assert f"reached after {first} epochs" in (tmp_path / "runs" / "timed" / "train.log").read_text()


@pytest.mark.slow
def test_a_target_that_is_not_reached_has_no_time(small_config: Callable[..., TrainConfig]) -> None:
    summary = fit(small_config(epochs=1, target_accuracy=1.0))
    assert summary["seconds_to_target"] is None and summary["epochs_to_target"] is None


@pytest.mark.slow
def test_the_clock_goes_on_in_a_resumed_run(small_config: Callable[..., TrainConfig]) -> None:
    first = fit(small_config(stop_after=1, target_accuracy=0.01))
    assert first["epochs_to_target"] == 1
    resumed = fit(small_config(target_accuracy=0.01), resume="must")
    assert resumed["seconds_to_target"] == first["seconds_to_target"]
    assert resumed["eval_seconds"] > first["eval_seconds"]


@pytest.mark.slow
def test_a_signal_at_the_end_of_a_seed_keeps_the_next_from_starting(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = metrics.finish

    def finish_while_asked_to_stop(*arguments: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return finish(*arguments)

    monkeypatch.setattr(metrics, "finish", finish_while_asked_to_stop)
    with pytest.raises(Preempted, match="^SIGTERM before seed 1; --resume auto continues with it$"):
        fit_seeds(small_config(epochs=1, exp_name="many"), 2)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"many-seed0"}
    monkeypatch.undo()
    assert fit_seeds(small_config(epochs=1, exp_name="many"), 2, resume="auto")["seeds"] == [0, 1]


@pytest.mark.slow
def test_two_processes_train_several_seeds(tmp_path: Path) -> None:
    flags = ("--runs-dir", tmp_path, "--epochs", 1, "--embed-dim", 8, "--depth", 1, "--attention", "fused")
    done = launch("--repeat", 2, *flags, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 seeds, 0 to 1") == 1
    found = json.loads((tmp_path / "digits-mc_vit_4_4_32-2seeds.json").read_text())
    assert [len(found[key]["values"]) for key in ("test_accuracy", "train_seconds")] == [2, 2]


@pytest.mark.slow
def test_numbers_out_of_range_are_one_line(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--repeat 0 is out of range; allowed: 1 or more"):
        fit_seeds(small_config(), 0)
    done = launch("--target-accuracy", 75, "--runs-dir", tmp_path / "runs")
    assert done.returncode != 0
    assert one_line_error(done.stderr) == (
        "--target-accuracy 75.0 is out of range; allowed: above 0, at most 1 (0.75 means 75%)"
    )
    assert not (tmp_path / "runs").exists()

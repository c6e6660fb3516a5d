"""A sweep trains its trials once each, goes on where it was stopped, and shares them out between processes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")
import optuna
from optuna.trial import TrialState
from PIL import Image

from fastvit_train.cli.main import main
from fastvit_train.config.recipes import recipe
from fastvit_train.distributed import preflight
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.results import read_summary
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.sweep import study as studies
from fastvit_train.training.sweep.space import parse
from tests.support import environment, one_line_error, wait_until

SMALL = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--patch-size", "8", "--attention", "fused"]
SMALL += ["--batch-size", "240", "--holdout", "0.2", "--epochs", "2"]
SEARCH = ["lr=1e-4..3e-2:log", "momentum=0.9,0.95"]


def command(runs: Path, *flags: object) -> list[str]:
    return ["sweep", *SEARCH, *SMALL, "--runs-dir", str(runs), *map(str, flags)]


def trials(runs: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(runs / "sweep" / studies.JOURNAL))
    )
    return optuna.load_study(study_name="sweep", storage=storage).get_trials()


@pytest.mark.slow
def test_trials_are_runs_with_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(tmp_path, "--trials", 1))
    folder, done = tmp_path / "sweep", trials(tmp_path)
    assert [trial.state for trial in done] == [TrialState.COMPLETE]
    for trial in done:
        run = folder / trial.user_attrs["run"]
        summary, config = read_summary(run), (run / "config.yaml").read_text()
        assert trial.value == summary["test_accuracy"] and summary["evaluated_on"] == "holdout"
        assert f"lr: {trial.params['lr']}" in config and f"momentum: {trial.params['momentum']}" in config
        assert [row["test_accuracy"] for row in read_jsonl(run / "metrics.jsonl")] == [
            trial.intermediate_values[epoch] for epoch in (1, 2)
        ]
    best = max(done, key=lambda trial: trial.value or 0)
    first_row = (folder / "sweep.md").read_text().splitlines()[2]
    assert first_row.startswith(f"| {best.user_attrs['run']} |") and f"{best.value:.2%}" in first_row
    with Image.open(folder / "sweep.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**20) or ()}
    assert (0, 0x72, 0xB2) in colors, "the finished trials are drawn"
    printed = capsys.readouterr().out
    assert f"best {best.value:.2%} (trial-0001)" in printed and "sweep.png" in printed
    main(command(tmp_path, "--trials", 1))  # nothing is left to train
    assert len(trials(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        lambda pid: os.kill(pid, signal.SIGTERM),
        lambda pid: os.killpg(pid, signal.SIGINT),
        lambda pid: os.killpg(pid, signal.SIGHUP),
    ],
    ids=["SIGTERM", "Ctrl-C in a terminal", "a terminal that is closed"],
)
def test_a_stopped_sweep_goes_on_with_the_trial_under_way(tmp_path: Path, stop: Callable[[int], None]) -> None:
    flags = command(tmp_path, "--trials", 2, "--epochs", 10, "--no-prune")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvit_train", *flags], env=environment(), start_new_session=True
    )
    run = tmp_path / "sweep" / "trial-0001"
    wait_until(lambda: (run / "checkpoints" / "last").exists())
    stop(process.pid)
    assert process.wait(120) == 130
    assert not (run / ".holder.json").exists(), "the trial was ended before it wrote a checkpoint"
    RunLock(run).check_free()  # nothing trains the trial any more
    (before,) = trials(tmp_path)
    assert before.state == TrialState.RUNNING
    epochs = len(read_jsonl(run / "metrics.jsonl"))
    assert epochs < 10
    done = subprocess.run(
        [sys.executable, "-m", "fastvit_train", *flags], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    finished = [trial for trial in trials(tmp_path) if trial.state == TrialState.COMPLETE]
    assert [trial.user_attrs["run"] for trial in finished] == ["trial-0001", "trial-0002"]
    assert finished[0].params == before.params
    assert [row["epoch"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, 11))
    assert "resuming" in (run / "train.log").read_text()


def test_a_trial_whose_process_was_killed_before_it_had_a_name_is_done_again(tmp_path: Path) -> None:
    arguments = (tmp_path, recipe("quickstart"), ["lr=0.1..0.2"], False)
    study, space = studies._open(*arguments), parse(["lr=0.1..0.2"], recipe("quickstart"))
    nameless = study.ask(space)
    trial, claim = studies._start_trial(studies._open(*arguments), space, tmp_path, trials=1, seed=0) or pytest.fail(
        "no trial"
    )
    with claim:
        assert trial.params == nameless.params and trial.user_attrs["run"] == "trial-0001"
        assert studies._start_trial(study, space, tmp_path, trials=1, seed=0) is None
    assert [each.state for each in study.get_trials()] == [TrialState.FAIL, TrialState.RUNNING]


def test_processes_and_starts_draw_different_settings(tmp_path: Path) -> None:
    arguments = (tmp_path, recipe("quickstart"), ["lr=0.1..0.2"], False)
    space = parse(["lr=0.1..0.2"], recipe("quickstart"))
    drawn = []
    for _ in range(4):
        study = studies._open(*arguments)
        trial, claim = studies._start_trial(study, space, tmp_path, trials=4, seed=0) or pytest.fail("no trial")
        drawn.append(trial.params["lr"])
        with claim:
            study.tell(trial, 0.5)
    assert len(set(drawn)) == 4


def test_a_trial_that_outlived_its_killed_sweep_is_left_alone(tmp_path: Path) -> None:
    arguments = (tmp_path, recipe("quickstart"), ["lr=0.1..0.2"], False)
    study, space = studies._open(*arguments), parse(["lr=0.1..0.2"], recipe("quickstart"))
    _, claim = studies._start_trial(study, space, tmp_path, trials=1, seed=0) or pytest.fail("no trial")
    with claim:
        pass  # the sweep is killed
    training = RunLock(tmp_path / "trial-0001")
    training.acquire()
    assert studies._start_trial(study, space, tmp_path, trials=1, seed=0) is None
    training.release()
    again, claim = studies._start_trial(study, space, tmp_path, trials=1, seed=0) or pytest.fail("no trial")
    with claim:
        assert again.user_attrs["run"] == "trial-0001"


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # a run then prints a line after its error
    flags = ["sweep", "momentum=0.9,0.95", "--lr", "1e9", *SMALL, "--runs-dir", str(tmp_path), "--trials", "2"]
    with pytest.raises(SystemExit) as stop:
        main(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "was finished; search other values" in one_line_error(err)
    assert [trial.state for trial in trials(tmp_path)] == [TrialState.FAIL, TrialState.FAIL]
    assert "trial-0002: " in out and "the loss became" in out and "best" not in out
    assert (tmp_path / "sweep" / "sweep.md").read_text().count("| failed |") == 2


@pytest.mark.slow
def test_two_processes_share_the_trials_out(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fastvit_train", *command(tmp_path, "--trials", 4, "--no-prune")]
    both = [subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(trial.user_attrs["run"] for trial in trials(tmp_path)) == [f"trial-000{i}" for i in (1, 2, 3, 4)]
    lines = [line.partition(":")[0] for output in outputs for line in output.splitlines() if line.startswith("trial-")]
    assert sorted(lines) == [f"trial-000{i}" for i in (1, 2, 3, 4)]


@pytest.mark.slow
def test_hopeless_trials_are_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any learning, the accuracy stays below that of others; with seed 2 the first trial learns."""
    monkeypatch.setattr(studies, "FIRST_UNPRUNED", 1)
    flags = ["sweep", "lr=0.006,0", *SMALL[:-1], "20", "--seed", "2", "--runs-dir", str(tmp_path), "--trials", "4"]
    main(flags)
    done = trials(tmp_path)
    stopped = [trial for trial in done if trial.state == TrialState.PRUNED]
    assert stopped and all(trial.params["lr"] == "0" and 7 <= max(trial.intermediate_values) < 20 for trial in stopped)
    assert "stopped early" in (tmp_path / "sweep" / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--holdout", "0"], "never on the test set; give --holdout 0.1"),
        (["--trials", "0"], "--trials 0 is out of range; allowed: 1 or more"),
        (["--name", "a/b"], "--name 'a/b' is not allowed; allowed: a plain folder name"),
        (["lr=2..1"], "lr=2..1 is empty"),
        pytest.param(["--num-heads", "3"], "trial-0001 .* failed: .*3", marks=pytest.mark.slow),
    ],
    ids=["no holdout", "no trials", "path", "empty range", "first trial fails"],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    words = [] if flags[0].startswith("lr=") else SEARCH
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *words, *SMALL, "--runs-dir", str(tmp_path / "runs"), *flags])
    assert stop.value.code == 2
    error = one_line_error(capsys.readouterr().err)
    assert re.search(message, error), error
    assert "trial-0001" in error or not (tmp_path / "runs").exists()
    assert not (tmp_path / "runs" / "sweep").exists()


def test_a_launch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "launcher_command", lambda: ["accelerate", "launch"])
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *SEARCH, *SMALL, "--runs-dir", str(tmp_path / "runs")])
    assert stop.value.code == 2 and not (tmp_path / "runs").exists()
    assert "sweep starts the processes of its runs itself; start `python -m" in one_line_error(capsys.readouterr().err)


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *SEARCH, *SMALL, "--runs-dir", str(tmp_path / "runs")])
    assert stop.value.code == 2 and not (tmp_path / "runs").exists()
    assert "sweep runs in one process, and the launch started 2" in one_line_error(capsys.readouterr().err)


@pytest.mark.slow
def test_another_search_does_not_go_on_with_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(**changes: Any) -> list[str]:
        return command(tmp_path, "--trials", 1, *(f"--{key}={value}" for key, value in changes.items()))

    main(settings())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for flags, message in (
        (settings(seed=1), "holds a sweep with another search or other settings; give another --name"),
        (
            ["sweep", "depth=1,2", *settings()[1:]],
            "holds a sweep with another search or other settings; give another --name",
        ),
        (settings(name="other"), "holds something else than a sweep; give another --name"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 2 and message in one_line_error(capsys.readouterr().err)

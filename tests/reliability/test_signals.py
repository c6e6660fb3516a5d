"""After a signal, a run writes a complete checkpoint within seconds, reports it, and resumes from it exactly."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fastvit_train.runs import checkpoint
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import Preempted
from tests.reliability.victims import (
    LIMIT,
    SETTINGS,
    DieAt,
    Victim,
    differences,
    outcome,
    random_trick,
    undisturbed,
)
from tests.support import environment, launch_command

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HANG = 120
"""seconds that saving a checkpoint takes when it hangs"""
Count = Callable[..., None]


def check_checkpoint_left(folder: Path, log: Path) -> Path:
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None and atomic_io.find_damage(newest) is None
    assert f"the last good checkpoint is {newest}" in log.read_text()
    return newest


def check_stopped(victim: Victim, statuses: list[int | None]) -> None:
    assert statuses == [Preempted.exit_status] * len(statuses), victim.log.read_text()
    newest = check_checkpoint_left(victim.folder, victim.log)
    said = f"at step {newest.name.removeprefix('step_')}; the last good checkpoint is {newest}, --resume auto continues"
    assert victim.log.read_text().count(said) == 1 and not victim.has("Traceback")


def stop_and_resume(runs: Path, stream: random.Random, processes: int, stops: int, count: Count) -> None:
    """Send a signal to one process of a run at a random point, `stops` times, and resume the run each time."""
    name = f"stopped-{stream.randrange(10**9)}"
    while stops:
        rank = stream.randrange(processes)
        trick = random_trick(stream, stream.choice(STOPS), rank)
        victim = Victim(runs, name, "--resume", "auto", processes=processes, trick=trick)
        statuses = victim.wait()
        if statuses == [0] * processes:
            name = f"stopped-{stream.randrange(10**9)}"  # the run ended before it reached that point
            continue
        check_stopped(victim, statuses)
        victim.log.unlink()
        stops -= 1
        count("SIGINT, SIGTERM and SIGUSR1 at random, a whole checkpoint and nothing lost")
    victim = Victim(runs, name, "--resume", "auto", processes=processes)
    assert victim.wait() == [0] * processes, victim.log.read_text()
    found, expected = outcome(victim.folder), undisturbed(processes)
    # The checkpoint that the signal caused may be one of the newest that are kept.
    assert len(found.pop("checkpoints")) == len(expected["checkpoints"])
    assert differences(found, {part: expected[part] for part in found}) == []


@pytest.mark.parametrize(
    ("processes", "rounds", "stops"),
    [
        pytest.param(1, 1, 1, id="one-process", marks=pytest.mark.slow),
        pytest.param(2, 1, 1, id="two-processes", marks=pytest.mark.slow),
        pytest.param(1, 4, 3, id="one-process-12-times", marks=pytest.mark.soak),
        pytest.param(2, 3, 3, id="two-processes-9-times", marks=pytest.mark.soak),
    ],
)
def test_a_run_that_a_signal_stopped_resumes_exactly(
    processes: int, rounds: int, stops: int, tmp_path: Path, seed: int, count: Count
) -> None:
    stream = random.Random(seed)
    for _ in range(rounds):
        stop_and_resume(tmp_path, stream, processes, stops, count)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("training.prepare.build_model", signal.SIGTERM),
        ("training.loop._train_step", signal.SIGINT),
        pytest.param("training.prepare.build_model", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("training.loop.evaluate_model", signal.SIGTERM, marks=pytest.mark.slow),
        ("utils.atomic_io.write_checksums", signal.SIGTERM),
    ],
)
def test_a_signal_during_setup_evaluation_or_saving(where: str, number: signal.Signals, tmp_path: Path) -> None:
    victim = Victim(tmp_path, "run", trick=DieAt(where, 1, number))
    check_stopped(victim, victim.wait())


@pytest.mark.slow
def test_a_signal_during_compilation(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "run", "--compile", trick=DieAt("training.prepare.warm_up", 1, signal.SIGTERM))
    check_stopped(victim, victim.wait())
    assert (victim.folder / "checkpoints" / "step_0").is_dir()


@pytest.mark.slow
def test_a_signal_stops_all_ranks_within_a_few_epochs(tmp_path: Path) -> None:
    """An epoch takes a tenth of a second, and the ranks exchange their status every quarter of a second."""
    victim = Victim(tmp_path, "run", "--epochs", 1000, processes=2)
    victim.wait_for("epoch   2/")
    victim.signal(signal.SIGUSR1, rank=1)
    check_stopped(victim, victim.wait())
    assert len(read_jsonl(victim.folder / "metrics.jsonl")) < 30


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    trick = DieAt("training.loop.collect_totals", 1, number, trick=hang_when_saving)
    victim = Victim(tmp_path, "run", trick=trick)
    victim.wait_for("hanging")
    victim.wait_for(f"{number.name}: the run saves a checkpoint and stops; repeat it to end at once")
    victim.signal(number)
    assert victim.wait(seconds=HANG / 2) == [128 + number]
    assert checkpoint.newest(victim.folder / "checkpoints") is None and not victim.has("Traceback")


def hang_when_saving() -> None:
    def hang(*_: object) -> None:
        print("hanging", flush=True)
        time.sleep(HANG)

    atomic_io.write_checksums = hang


@pytest.mark.slow
def test_a_run_that_is_being_trained_is_refused_to_others_and_a_stale_lock_is_not(tmp_path: Path) -> None:
    first = Victim(tmp_path, "run", "--epochs", 1000)
    first.wait_for("epoch   1/")
    for how in (("--resume", "auto"), ("--overwrite",), ()):
        second = Victim(tmp_path, "run", "--epochs", 1000, *how)
        assert second.wait() == [2]
    assert first.log.read_text().count(f"is being trained by process {first.processes[0].pid} on ") == 3
    first.kill()
    third = Victim(tmp_path, "run", "--epochs", 1000, "--stop-after", 2, "--resume", "auto")
    assert third.wait() == [0] and third.has(f"the lock of process {first.processes[0].pid} on ")
    assert not (third.folder / ".holder.json").exists()


def start(folder: Path, *args: object, processes: int = 1, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """Launch the victims' training as a user does, with the run in `folder` and its output in `folder`.out."""
    where = ("--runs-dir", folder.parent, "--exp-name", folder.name)
    command = launch_command(*where, *SETTINGS, *args, processes=processes, before=before)
    with folder.with_suffix(".out").open("wb") as log:
        env = environment(OMP_NUM_THREADS="1")
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, process_group=0)


def holder(folder: Path, text: str) -> int:
    """Wait until the run in `folder` has printed `text`, and return the process id of its rank 0."""
    deadline = time.monotonic() + LIMIT
    while text not in folder.with_suffix(".out").read_text():
        assert time.monotonic() < deadline, folder.with_suffix(".out").read_text()
        time.sleep(0.02)
    return int(json.loads((folder / ".holder.json").read_text())["pid"])


@pytest.mark.slow
def test_a_checkpoint_is_written_if_the_launcher_is_stopped(tmp_path: Path) -> None:
    """accelerate's launcher of one process ends on SIGTERM without passing the signal on to its child."""
    folder = tmp_path / "run"
    launcher = start(folder, "--epochs", 1000)
    trainer = psutil.Process(holder(folder, "epoch   2/"))
    launcher.terminate()
    launcher.wait(LIMIT)
    trainer.wait(LIMIT)
    check_checkpoint_left(folder, folder.with_suffix(".out"))


@pytest.mark.soak
def test_a_checkpoint_is_written_if_the_launcher_of_two_processes_is_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, "--epochs", 1000, processes=2)
    holder(folder, "epoch   2/")
    launcher.terminate()
    launcher.wait(LIMIT)
    check_checkpoint_left(folder, folder.with_suffix(".out"))


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.soak)]
)
def test_ctrl_c_under_a_launcher_leaves_a_checkpoint(processes: int, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher and to what it has started. Accelerate's launcher of one process dies."""
    folder = tmp_path / "run"
    launcher = start(folder, "--epochs", 1000, processes=processes)
    trainer = psutil.Process(holder(folder, "epoch   2/"))
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(LIMIT)
    trainer.wait(LIMIT)
    check_checkpoint_left(folder, folder.with_suffix(".out"))
    assert "stopped: SIGINT at step" in folder.with_suffix(".out").read_text()


@pytest.mark.slow
def test_the_launcher_restarts_a_run_whose_process_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, "--resume", "auto", processes=2, before=("--max_restarts", "3"))
    victim = holder(folder, "epoch   1/")
    psutil.Process(victim).kill()
    assert launcher.wait(LIMIT) == 0, folder.with_suffix(".out").read_text()
    said = folder.with_suffix(".out").read_text()
    assert said.count("world size 2") == 2 and "resuming" in said
    assert differences(outcome(folder), undisturbed(2)) == []

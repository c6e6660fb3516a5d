"""A run that is killed at any point and resumed ends with the same bits; no sample is repeated or left out."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_train.runs.run_folder import read_jsonl
from tests.reliability.victims import (
    DieAt,
    Victim,
    differences,
    forget_the_samplers_position,
    outcome,
    random_trick,
    undisturbed,
)

KILLED = -signal.SIGKILL
Count = Callable[..., None]


def kill_and_resume(runs: Path, stream: random.Random, processes: int, kills: int) -> dict[str, Any]:
    """Kill a run `kills` times, at random points or times, resume it with --resume auto, and return its outcome."""
    name = f"killed-{stream.randrange(10**9)}"
    while kills:
        rank = stream.randrange(processes)
        at_a_moment = stream.random() < 0.3
        trick = None if at_a_moment else random_trick(stream, signal.SIGKILL, rank)
        victim = Victim(runs, name, "--resume", "auto", processes=processes, trick=trick)
        if at_a_moment:
            victim.processes[rank].join(stream.uniform(0, 2.5))
            victim.signal(signal.SIGKILL, rank)
        statuses = victim.wait()
        if statuses[rank] == KILLED:
            kills -= 1
        else:
            assert statuses == [0] * processes, victim.log.read_text()
            name = f"killed-{stream.randrange(10**9)}"  # it ended before the kill: continue with another run
    victim = Victim(runs, name, "--resume", "auto", processes=processes)
    assert victim.wait() == [0] * processes, victim.log.read_text()
    assert victim.has(f"world size {processes}")
    return outcome(victim.folder)


@pytest.mark.parametrize(
    ("processes", "rounds", "kills"),
    [
        pytest.param(1, 1, 1, id="one-process", marks=pytest.mark.slow),
        pytest.param(2, 1, 1, id="two-processes", marks=pytest.mark.slow),
        pytest.param(1, 6, 6, id="one-process-36-times", marks=pytest.mark.soak),
        pytest.param(2, 4, 4, id="two-processes-16-times", marks=pytest.mark.soak),
    ],
)
def test_a_run_killed_at_random_ends_as_one_that_was_not(
    processes: int, rounds: int, kills: int, tmp_path: Path, seed: int, count: Count
) -> None:
    stream = random.Random(seed)
    expected = undisturbed(processes)
    for _ in range(rounds):
        found = kill_and_resume(tmp_path, stream, processes, kills)
        assert differences(found, expected) == []
        count(f"random kills of {processes} process{'es' * (processes > 1)}, nothing lost", kills)


@pytest.mark.slow
def test_a_checkpoint_without_the_samplers_position_is_noticed(tmp_path: Path) -> None:
    # The last checkpoint before the kill is that of step 15, within epoch 2.
    die = DieAt("training.loop._train_step", 16, trick=forget_the_samplers_position)
    assert Victim(tmp_path, "faulty", trick=die).wait() == [KILLED]
    victim = Victim(tmp_path, "faulty", "--resume", "must")
    assert victim.wait() != [0] or differences(outcome(victim.folder), undisturbed(1))


@pytest.mark.slow
def test_a_run_killed_before_it_removes_an_old_checkpoint_removes_it_later(tmp_path: Path) -> None:
    last = 13
    die = DieAt("runs.checkpoint._prune", last, signal.SIGKILL)
    assert Victim(tmp_path, "killed", trick=die).wait() == [KILLED]
    victim = Victim(tmp_path, "killed", "--resume", "must")
    assert victim.wait() == [0] and differences(outcome(victim.folder), undisturbed(1)) == []


@pytest.mark.slow
def test_a_run_killed_before_it_writes_the_best_weights_writes_them_when_resumed(tmp_path: Path) -> None:
    accuracies = [row["test_accuracy"] for row in undisturbed(1)["metrics"]]
    best_so_far = sum(accuracy > max(accuracies[:epoch], default=-1) for epoch, accuracy in enumerate(accuracies))
    die = DieAt("training.metrics.write_weights", best_so_far)
    assert Victim(tmp_path, "killed", trick=die).wait() == [KILLED]
    victim = Victim(tmp_path, "killed", "--resume", "must")
    assert victim.wait() == [0] and differences(outcome(victim.folder), undisturbed(1)) == []


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    """There is no dropout, because each process draws its own."""
    same = ("--drop-rate", "0", "--ema", "0.99")
    whole = Victim(tmp_path, "whole", *same)
    assert whole.wait() == [0], whole.log.read_text()
    assert Victim(tmp_path, "parts", *same, trick=DieAt("training.loop._train_step", 8)).wait() == [KILLED]
    die = DieAt("training.loop._train_step", 12, rank=1)
    two = Victim(tmp_path, "parts", *same, "--resume", "must", processes=2, trick=die)
    assert two.wait()[1] == KILLED and two.has("world size 2")
    one = Victim(tmp_path, "parts", *same, "--resume", "must")
    assert one.wait() == [0], one.log.read_text()
    expected, found = ([row["loss"] for row in read_jsonl(v.folder / "steps.jsonl")] for v in (whole, one))
    assert len(expected) == 33 and found == pytest.approx(expected, abs=1e-5)
    assert [row["epoch"] for row in read_jsonl(one.folder / "metrics.jsonl")] == [1, 2, 3]

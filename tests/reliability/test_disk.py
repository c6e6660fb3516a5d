"""On a full, read-only or damaged disk, earlier files stay intact and the run reports the problem."""

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvit_train.runs import checkpoint
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.utils import atomic_io
from tests.reliability.victims import Victim, differences, outcome, undisturbed

Count = Callable[..., None]
BALLAST = "ballast"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Fill the file system until `leave` bytes are free."""
    status = os.statvfs(disk)
    (disk / BALLAST).write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - leave)))


def said(victim: Victim) -> str:
    return " ".join(victim.log.read_text(errors="replace").split())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "continue"])
def test_a_disk_that_fills_up(how: str, disk: Path, tmp_path: Path, seed: int, count: Count) -> None:
    """A checkpoint takes about 150 KiB; a random number of bytes is left, enough for at most two more."""
    logs = tmp_path / "logs"
    logs.mkdir()
    first = Victim(disk, "run", "--stop-after", 1, log=logs / "first")
    assert first.wait() == [0], said(first)
    before = checkpoint.newest(first.folder / "checkpoints")
    fill(disk, leave=random.Random(seed).randrange(10_000, 300_000))  # a run needs some KB to be resumed at all
    second = Victim(disk, "run", "--resume", "must", "--on-save-error", how, log=logs / "second")
    status, words = second.wait(), said(second)
    assert status == [2] or (how == "continue" and status == [0]), words  # the final weights may fit
    assert "Traceback" not in words, second.log.read_text()
    assert words.count("fastvit_train: error:") == (status == [2])
    newest = checkpoint.newest(second.folder / "checkpoints")
    assert newest is not None and before is not None and int(newest.name[5:]) >= int(before.name[5:])
    assert (
        atomic_io.find_damage(newest) is None and (second.folder / "checkpoints" / "last").resolve() == newest.resolve()
    )
    if how == "stop":
        failed = r"(no checkpoint could be written|(metrics of .*|best.safetensors) could not be written)"
        assert re.search(rf"{failed}.* at step \d+; the last good", words)
        assert f"checkpoint is {newest}; free disk space and continue with --resume auto" in words
    else:
        assert "training continues (--on-save-error continue)" in words and "epoch 3/3" in words
    (disk / BALLAST).unlink()
    third = Victim(disk, "run", "--resume", "must", log=logs / "third")
    assert third.wait() == [0], said(third)
    assert differences(outcome(third.folder), undisturbed(1)) == []
    count(f"disks filled up, {how}, nothing lost")


@pytest.mark.slow
def test_a_read_only_folder(disk: Path, tmp_path: Path) -> None:
    finished = Victim(disk, "run", "--stop-after", 1, log=tmp_path / "first")
    assert finished.wait() == [0], said(finished)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name, more in (("run", ("--resume", "must")), ("run", ("--overwrite",)), ("other", ())):
        refused = Victim(disk, name, *more, log=tmp_path / f"{name}{len(more)}")
        assert refused.wait() == [2]
        words = said(refused)
        assert words.count("fastvit_train: error: can't write") == 1 and "choose another --runs-dir" in words
        assert "Traceback" not in words
    assert atomic_io.find_damage(finished.folder / "checkpoints" / "last") is None
    assert sorted(path.name for path in disk.iterdir()) == ["run"]


@pytest.mark.slow
def test_a_disk_without_room_for_a_resumed_run(disk: Path, tmp_path: Path) -> None:
    first = Victim(disk, "run", "--stop-after", 1, log=tmp_path / "first")
    assert first.wait() == [0], said(first)
    fill(disk, leave=0)
    second = Victim(disk, "run", "--resume", "must", log=tmp_path / "second")
    assert second.wait() == [2]
    assert "run (No space left on device); free disk space, or choose another --runs-dir" in said(second)


def spoil(path: Path, kind: str) -> None:
    """Damage a file."""
    content = path.read_bytes()
    middle = len(content) // 2
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one bit", "missing", "cut short"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(kind: str, tmp_path: Path, seed: int) -> None:
    victim = Victim(tmp_path, "run", "--stop-after", 2)
    assert victim.wait() == [0]
    last = victim.folder / "checkpoints" / "last"
    names = sorted(path.name for path in last.iterdir())
    name = random.Random(seed).choice(names)
    spoil(last / name, kind)
    resumed = Victim(tmp_path, "run", "--resume", "must")
    assert resumed.wait() == [0], said(resumed)
    assert re.search(r"checkpoint step_22 is damaged \(.*\): continuing from step_21", said(resumed))
    assert differences(outcome(resumed.folder), undisturbed(1)) == []


@pytest.mark.slow
def test_nothing_changes_if_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "run", "--stop-after", 1)
    assert victim.wait() == [0]
    for path in (victim.folder / "checkpoints").glob("step_*/optimizer.bin"):
        path.write_bytes(b"")
    before = {path: path.read_bytes() for path in victim.folder.rglob("*") if path.is_file()}
    resumed = Victim(tmp_path, "run", "--resume", "auto")
    assert resumed.wait() == [2]
    assert "checkpoint step_11 is damaged (optimizer.bin does not match its checksum); checkpoint step_9" in said(
        resumed
    )
    assert "start over with --overwrite" in said(resumed) and "Traceback" not in said(resumed)
    assert before == {path: path.read_bytes() for path in victim.folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(keep: int, tmp_path: Path) -> None:
    victim = Victim(tmp_path, "run", "--keep", keep)
    assert victim.wait() == [0]
    rows = read_jsonl(victim.folder / "metrics.jsonl")
    best = max(rows, key=lambda row: row["test_accuracy"])["step"]  # the first of equals
    kept = {int(path.name[5:]) for path in (victim.folder / "checkpoints").glob("step_*")}
    assert kept == {*(33, 30, 27)[:keep], best}
    saved = json.loads((victim.folder / "checkpoints" / "best" / "progress.json").read_text())["progress"]
    assert saved["step"] == saved["best_step"] == best


@pytest.mark.slow
def test_the_best_checkpoint_that_could_be_written_is_kept(tmp_path: Path) -> None:
    """The best epoch's checkpoint is damaged later; the link then leads to the best one that is left."""
    victim = Victim(tmp_path, "run", "--stop-after", 2, "--keep", 9)
    assert victim.wait() == [0]
    checkpoints = victim.folder / "checkpoints"
    spoil(checkpoints / "step_22" / "model.safetensors", "missing")
    resumed = Victim(tmp_path, "run", "--resume", "must", "--stop-after", 2, "--keep", 1)
    assert resumed.wait() == [0], said(resumed)
    assert atomic_io.find_damage(checkpoints / "best") is None
    rows = read_jsonl(victim.folder / "metrics.jsonl")
    assert (checkpoints / "best").resolve().name == f"step_{max(rows, key=lambda row: row['test_accuracy'])['step']}"

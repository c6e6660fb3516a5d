"""File systems without links, locks, permissions or the sync of folders, and runs that were copied to or from them."""

import errno
import functools
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.inference.report.page import write_report
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs import checkpoint
from fastvit_train.runs.lock import HOLDER, RunLock
from fastvit_train.training.loop import fit
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError, UserError
from tests.reliability.victims import Victim, differences, outcome, undisturbed
from tests.support.file_systems import on_every_disk, take_abilities_away

Config = Callable[..., TrainConfig]


@pytest.mark.slow
@on_every_disk
def test_a_run_on_a_disk_that_lacks_abilities(number: int, tmp_path: Path) -> None:
    trick = functools.partial(take_abilities_away, tmp_path, number)
    for more in (("--stop-after", 2), ("--resume", "auto")):
        victim = Victim(tmp_path, "run", "--keep", 1, *more, trick=trick)
        assert victim.wait() == [0], victim.log.read_text()
    folder = victim.folder / "checkpoints"
    newest = checkpoint.newest(folder)
    assert newest == folder / "step_33" and (folder / "last").read_text() == "step_33"
    best = json.loads((newest / "progress.json").read_text())["progress"]["best_step"]
    assert (folder / "best").read_text() == f"step_{best}" and atomic_io.find_damage(folder / f"step_{best}") is None
    assert {path.name for path in folder.iterdir()} == {"last", "best", "step_33", f"step_{best}"}


@pytest.mark.slow
def test_a_run_that_goes_on_where_there_are_links(tmp_path: Path) -> None:
    trick = functools.partial(take_abilities_away, tmp_path, errno.EPERM)
    for more in ({"trick": trick}, {}):
        victim = Victim(tmp_path, "run", *(("--resume", "must") if not more else ("--stop-after", 2)), **more)
        assert victim.wait() == [0], victim.log.read_text()
    assert differences(outcome(victim.folder), undisturbed(1)) == []
    assert all((victim.folder / "checkpoints" / name).is_symlink() for name in checkpoint.LINKS)


@on_every_disk
def test_a_disk_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live process of this machine keeps the folder; a dead one does not, nor does one of a machine that is gone."""
    take_abilities_away(tmp_path, number, monkeypatch.setattr)
    held = RunLock(tmp_path)
    assert "has no locks: train into it on one machine at a time" in held.acquire()[0]
    for refused in (RunLock(tmp_path).check_free, RunLock(tmp_path).acquire):
        with pytest.raises(UserError, match="is being trained by process"):
            refused()
    held.release()
    RunLock(tmp_path).check_free()
    assert not (tmp_path / HOLDER).exists()
    for host, pid, started in ((socket.gethostname(), os.getpid(), 1.0), ("elsewhere", 1, psutil.boot_time())):
        (tmp_path / HOLDER).write_text(json.dumps({"pid": pid, "host": host, "started": started}))
        other = RunLock(tmp_path)
        assert f"took over the lock of process {pid} on {host}" in other.acquire()[1]
        other.release()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_only_a_full_disk_is_called_full(number: int, small_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic_io, "publish_folder", refuse)
    with pytest.raises(SaveError, match=os.strerror(number)) as caught:
        fit(small_config(stop_after=1))
    remedy = "free disk space" if number in atomic_io.DISK_IS_FULL else "check that the disk can be written"
    assert f"; {remedy} and continue with --resume auto" in str(caught.value)


def follow(run: Path, copy: Path) -> None:
    """As `cp -rL` and object stores do."""
    shutil.copytree(run, copy)


def keep_as_text(run: Path, copy: Path) -> None:
    """As git does where there are no links."""
    follow(run, copy)
    for name in checkpoint.LINKS:
        shutil.rmtree(copy / "checkpoints" / name)
        (copy / "checkpoints" / name).write_text((run / "checkpoints" / name).readlink().name + "\n")


def lose(run: Path, copy: Path) -> None:
    """As `rsync -r` does."""
    follow(run, copy)
    for name in checkpoint.LINKS:
        shutil.rmtree(copy / "checkpoints" / name)


def make_absolute(run: Path, copy: Path) -> None:
    follow(run, copy)
    for name in checkpoint.LINKS:
        shutil.rmtree(copy / "checkpoints" / name)
        (copy / "checkpoints" / name).symlink_to(Path("/gone") / (run / "checkpoints" / name).readlink().name)


def keep_only_last(run: Path, copy: Path) -> None:
    """Only the checkpoints that the links stand for are kept, under the links' names."""
    follow(run, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        shutil.rmtree(path)


def spoil_the_original(run: Path, copy: Path) -> None:
    follow(run, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        (path / "optimizer.bin").unlink()


COPIES = (
    follow,
    keep_only_last,
    *(pytest.param(copy, marks=pytest.mark.slow) for copy in (keep_as_text, lose, make_absolute, spoil_the_original)),
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stopped after two of its three epochs; to be read only."""
    runs = tmp_path_factory.mktemp("begun")
    victim = Victim(runs, "run", "--stop-after", 2)
    assert victim.wait() == [0], victim.log.read_text()
    return runs / "run"


@pytest.mark.slow
@pytest.mark.parametrize("copy", COPIES)
def test_a_copied_run_goes_on(copy: Callable[[Path, Path], None], begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    copy(begun, folder)
    if copy is not spoil_the_original:
        assert load_run(folder, checkpoint="22").checkpoint is not None
    victim = Victim(tmp_path, "run", "--resume", "must")
    assert victim.wait() == [0], victim.log.read_text()
    found = outcome(folder)
    missing = {"checkpoints"} if copy in (keep_only_last, spoil_the_original) else set()  # one was not copied
    assert set(differences(found, undisturbed(1))) <= missing
    if copy is follow:
        assert evaluate(folder).accuracy == found["metrics"][-1]["test_accuracy"]
        assert write_report([str(folder)], None, None).is_file()


@pytest.mark.slow
def test_a_copy_is_started_over(begun: Path, tmp_path: Path) -> None:
    follow(begun, tmp_path / "run")
    victim = Victim(tmp_path, "run", "--overwrite")
    assert victim.wait() == [0], victim.log.read_text()
    assert differences(outcome(victim.folder), undisturbed(1)) == []

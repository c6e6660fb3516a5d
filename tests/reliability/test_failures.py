"""An error anywhere in a run, on any rank, ends all of its processes within seconds, with one line that says why."""

import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from fastvit_train.data import images
from fastvit_train.distributed import env
from fastvit_train.training import loop
from tests.reliability.victims import Victim
from tests.support import write_folder


@dataclass(frozen=True)
class OnRank:
    """A trick on one rank only."""

    trick: Callable[[], None]
    rank: int
    tracebacks: Path
    """the folder for temporary files"""

    def __call__(self) -> None:
        tempfile.tempdir = str(self.tracebacks)
        if env.is_rank0() == (self.rank == 0):
            self.trick()


def break_decoding() -> None:
    """Let an image fail in a way that nobody expects, where worker processes decode."""
    decode = images.try_decode

    def fail(path: Path, *args: object) -> object:
        if path.parts[-3:] == ("train", "square", "1.png"):
            raise RuntimeError("the decoder\nis broken")
        return decode(path, *args)

    images.try_decode = fail
    images.MAX_WITHOUT_WORKERS = 0


def kill_a_worker() -> None:
    """Let a worker process be killed while it decodes, as the system does when memory runs out."""
    decode = images.try_decode

    def die(path: Path, *args: object) -> object:
        if path.parts[-3:] == ("train", "square", "1.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, *args)

    images.try_decode = die
    images.MAX_WITHOUT_WORKERS = 0


def before_step_five(act: Callable[[], object]) -> None:
    step, calls = loop._train_step, 0

    def train_step(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            act()
        step(*args)

    loop._train_step = train_step


def break_a_hook() -> None:
    def fail(module: object, arguments: object) -> None:
        raise ZeroDivisionError("the hook\nis broken")

    before_step_five(lambda: register_module_forward_pre_hook(fail))


def break_a_thread() -> None:
    def fail() -> None:
        raise ZeroDivisionError("the thread\nis broken")

    before_step_five(lambda: threading.Thread(target=fail, name="breaking").start())


def errors(victim: Victim) -> list[str]:
    """The lines that say what went wrong; fails on a traceback."""
    said = victim.log.read_text()
    assert "Traceback" not in said, said
    return re.findall(r"^fastvit_train: error: (.*)$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rank"), [(1, 0), (2, 1), (2, 0)])
@pytest.mark.parametrize(
    ("trick", "status", "message"),
    [
        (break_decoding, 2, r"a process that loads images failed \(RuntimeError: the decoder is broken\)"),
        (kill_a_worker, 2, "a process that loads images has ended"),
        (
            break_a_hook,
            1,
            r"ZeroDivisionError in test_failures\.py, line \d+: the hook is broken; the traceback is in \S+\.txt",
        ),
        (
            break_a_thread,
            75,
            r"thread breaking: ZeroDivisionError in test_\w+\.py, line \d+: the thread is broken; ",
        ),
    ],
    ids=["worker", "killed-worker", "hook", "thread"],
)
def test_an_error_anywhere_ends_the_run_with_one_line(
    processes: int, rank: int, trick: Callable[[], None], status: int, message: str, tmp_path: Path
) -> None:
    data = ("--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--stream", "always")
    sizes = ("--image-size", 32, "--batch-size", 4, "--save-every", 0, "--epochs", 1000)
    victim = Victim(tmp_path, "run", *data, *sizes, processes=processes, trick=OnRank(trick, rank, tmp_path))
    ends = victim.wait(60)
    said = errors(victim)
    assert len(said) == 1 and re.match(message, said[0]), victim.log.read_text()
    assert status != 1 or (tmp_path / said[0].split()[-1]).read_text().startswith("Traceback")
    assert ends[rank] == status and all(end is not None and end > 0 for end in ends), ends

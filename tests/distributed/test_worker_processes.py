"""Worker processes end with their parent, survive signals to the whole group, and fail in one line."""

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from fastvit_train.data import images
from fastvit_train.data.decode import ImageFiles
from fastvit_train.data.images import StreamedImages
from fastvit_train.distributed import worker_processes
from fastvit_train.distributed.worker_processes import load_in_workers
from fastvit_train.utils.errors import UserError
from tests.reliability.victims import SERVER
from tests.support import rgb, wait_until, write_folder

CPU = torch.device("cpu")
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


class Numbers(Dataset):
    """Item i is the number i; the item `at` does something first."""

    def __init__(self, at: int = -1, action: Callable[[], object] = int) -> None:
        self._at, self._action = at, action

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self._at:
            self._action()
        return torch.tensor(index)


def run_out_of_memory() -> None:
    raise MemoryError("no memory\nfor this image")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(300)


def fill_shared_memory(items: list[torch.Tensor]) -> None:
    raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")


@pytest.fixture(autouse=True)
def _two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "num_workers", lambda: 2)


def load(dataset: Dataset, collate: Callable[[list[torch.Tensor]], object] = default_collate) -> list[list[int]]:
    return [batch.tolist() for batch in load_in_workers(dataset, BATCHES, collate, pin_memory=False)]


def test_batches_come_in_order_and_nothing_of_the_process_changes() -> None:
    before = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, ()), torch.get_rng_state()
    assert load(Numbers()) == BATCHES
    after = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, ()), torch.get_rng_state()
    assert after[:2] == before[:2] and torch.equal(after[2], before[2])
    wait_until(lambda: not multiprocessing.active_children())


@pytest.mark.parametrize(
    ("dataset", "collate", "message"),
    [
        (Numbers(5, run_out_of_memory), default_collate, r"images failed \(MemoryError: no memory for this image\)"),
        (Numbers(), fill_shared_memory, r"/dev/shm is full, .*No space left on device \(28\).*--shm-size"),
        pytest.param(
            Numbers(5, die), default_collate, r"a process that loads images has ended .*memory", marks=pytest.mark.slow
        ),
    ],
    ids=["raises", "shared-memory", "dies"],
)  # fmt: skip
def test_a_worker_that_fails_is_reported_in_one_line(
    dataset: Dataset, collate: Callable[[list[torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(dataset, collate)
    assert "Traceback" not in str(caught.value) and not caught.value.on_all_ranks
    wait_until(lambda: not multiprocessing.active_children(), seconds=10)


def test_a_failure_is_one_line_after_another_loader_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a loader installs torch's handler of SIGCHLD, which raises an error if a worker that it knows is killed."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    others = iter(DataLoader(Numbers(), batch_sampler=BATCHES, num_workers=1, multiprocessing_context="fork"))
    try:
        assert signal.getsignal(signal.SIGCHLD) is not before
        with pytest.raises(UserError, match="no memory for this image"):
            load(Numbers(5, run_out_of_memory))
        assert [batch.tolist() for batch in others] == BATCHES
        wait_until(lambda: not multiprocessing.active_children(), seconds=10)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_with_a_batch_in_its_hands_is_reported_as_dead(error: Exception) -> None:
    assert worker_processes._explain(error).startswith("a process that loads images has ended (")


def leave_a_worker_behind() -> None:
    leave_a_worker_behind.batches = load_in_workers(Numbers(5, sleep), BATCHES, default_collate, False)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_worker_that_is_busy_does_not_keep_python_from_ending() -> None:
    process = SERVER.Process(target=leave_a_worker_behind)
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_signals_of_others_do_not_end_a_worker() -> None:
    batches = load_in_workers(Numbers(), BATCHES, default_collate, pin_memory=False)
    first = next(batches)
    for worker in multiprocessing.active_children():
        for name in ("INT", "TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [first.tolist(), *(batch.tolist() for batch in batches)] == BATCHES


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamedImages:
    """Twenty-four images, enough for workers."""
    monkeypatch.setattr(images, "MAX_WITHOUT_WORKERS", 0)
    images._log_once.cache_clear()
    return StreamedImages(ImageFiles(sorted(write_folder(tmp_path / "data").glob("train/*/*.png"))), rgb(32), CPU)


def read(streamed: StreamedImages) -> torch.Tensor:
    return torch.stack(list(streamed.batches(torch.arange(24).split(8))))


def test_too_little_shared_memory_is_said_once_and_threads_decode(
    streamed: StreamedImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read(streamed)
    assert not caplog.records
    needed = 8 * 3 * 32**2 * worker_processes.BATCHES_PER_WORKER * 2
    for free, lines in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(worker_processes.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with caplog.at_level(logging.WARNING):
            assert torch.equal(read(streamed), expected) and torch.equal(read(streamed), expected)
        assert len(caplog.records) == lines
    assert "/dev/shm has 0 MB free; enlarge it (docker run --shm-size=8g)" in caplog.text


def test_processes_that_cannot_be_started_are_said_once_and_threads_decode(
    streamed: StreamedImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read(streamed)

    def fail(loader: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_processes.DataLoader, "__iter__", fail)
    assert torch.equal(read(streamed), expected)
    assert "can't be started (Resource temporarily unavailable)" in caplog.text


def read_in_a_daemon(streamed: StreamedImages, results: "multiprocessing.SimpleQueue[float]") -> None:
    images.MAX_WITHOUT_WORKERS = 0
    results.put(float(read(streamed).float().sum()))


@pytest.mark.slow
def test_a_daemonic_process_decodes_in_threads(streamed: StreamedImages) -> None:
    results = SERVER.SimpleQueue()
    process = SERVER.Process(target=read_in_a_daemon, args=(streamed, results), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and results.get() == float(read(streamed).float().sum())

"""Worker processes that load batches while the device computes, and what ends them."""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastvit_train.distributed import env
from fastvit_train.utils import machine, torch_private
from fastvit_train.utils.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
BATCHES_PER_WORKER = 3
"""batches in shared memory for each worker at most: two that torch's DataLoader has requested, and the one in use"""
STOP_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
PR_SET_PDEATHSIG = 1  # sys/prctl.h


def num_workers() -> int:
    """Return the number of worker processes that this process should have: its share of the cores."""
    return max(1, machine.usable_cores() // env.local_world_size())


def why_unavailable(batch_bytes: int, workers: int) -> str | None:
    """Return why this process can't have worker processes, and what to do about it; None if it can."""
    if "fork" not in multiprocessing.get_all_start_methods() or not hasattr(signal, "sigwaitinfo"):
        return "this operating system can't fork processes that load images"
    if multiprocessing.current_process().daemon:
        return "a daemonic process, such as a worker of multiprocessing.Pool, can't start processes that load images"
    if not SHARED_MEMORY.is_dir():
        return None
    needed = batch_bytes * BATCHES_PER_WORKER * workers * env.local_world_size()
    if needed > (free := shutil.disk_usage(SHARED_MEMORY).free):
        return (
            f"processes that load images need {needed / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} has "
            f"{free / 1e6:,.0f} MB free; enlarge it (docker run --shm-size=8g), or lower the batch size"
        )
    return None


def load_in_workers(
    dataset: Dataset[Any], batches: Sequence[list[int]], collate: Callable[[list[Any]], Any], pin_memory: bool
) -> Iterator[Any]:
    """Yield `collate` of the items of each batch, in order.

    Args:
        dataset: gives an item by its index.
        batches: the indices of each batch.
        collate: makes a batch of a list of items; runs in a worker.
        pin_memory: whether tensors are copied to page-locked memory, from which a GPU copies faster.

    Raises:
        UserError: within seconds, if a worker fails or dies; raised by the iterator.
        OSError: if the workers can't be started.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(len(batches), num_workers()),
        collate_fn=collate,
        multiprocessing_context="fork",
        worker_init_fn=_obey_only_parent,
        generator=torch.Generator(),  # otherwise it would draw from the global one, which dropout uses
        pin_memory=pin_memory,
    )
    others = set(multiprocessing.active_children())
    try:
        iterator = _start(loader)
    except OSError:
        _kill(set(multiprocessing.active_children()) - others)
        raise
    return _iterate(iterator, set(multiprocessing.active_children()) - others)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers of `loader`; they inherit the blocked signals.

    torch's handler for the death of a worker would raise an error at any place in the main thread. So it is not
    installed, and one that another DataLoader has installed does not know these workers. Torch notices their death when
    it waits for the next batch, within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(loader)
        torch_private.forget_workers(iterator)
        return iterator
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _iterate(iterator: Iterator[Any], workers: set[multiprocessing.process.BaseProcess]) -> Iterator[Any]:
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # whatever a worker raised, or torch noticed about it
            _kill(workers)  # one may wait for a lock that a dead one held
            raise UserError(_explain(error), on_all_ranks=False) from None
        yield batch


def _kill(workers: set[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _obey_only_parent(worker: int) -> None:
    """In a worker: end when the parent asks for it or dies, and for no signal of others.

    A signal that asks a run to stop often goes to all of its processes, and the parent needs its batches until the end
    of the step.
    """
    signal_when_parent_dies(signal.SIGKILL)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def signal_when_parent_dies(number: int) -> None:
    """Make Linux send this process a signal when the thread that started it dies; 0 turns this off."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _explain(error: Exception) -> str:
    """Describe in one line why a worker failed; torch's message holds an indented traceback, and then the reason."""
    lines = str(error).splitlines()
    indented = [number for number, line in enumerate(lines, start=1) if line.startswith(" ")]
    reason = " ".join(lines[max(indented, default=0) :]) or type(error).__name__
    if any(sign in str(error) for sign in ("shared memory", "Bus error", "(shm)", "No space left on device")):
        return (
            f"{SHARED_MEMORY} is full, which processes that load images need ({reason}); "
            "enlarge it (docker run --shm-size=8g), or lower the batch size"
        )
    cut_off = isinstance(error, (OSError, EOFError)) and "in DataLoader worker" not in str(error)  # not raised there
    if cut_off or "killed by signal" in str(error) or "exited unexpectedly" in str(error):
        return (
            f"a process that loads images has ended ({reason}); if the system killed it because memory ran out, "
            "free memory or lower the batch size; --resume auto continues from the last checkpoint"
        )
    return f"a process that loads images failed ({reason})"

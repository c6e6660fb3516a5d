"""Stopping on a signal: a handler notes it, and the ranks agree on the batch after which all of them stop.

Ctrl-C sends SIGINT; schedulers, containers and torch's launcher send SIGTERM; SLURM sends SIGUSR1 ahead of a time limit
if the job asks for it (`--signal=USR1@60`, or `TERM@60`, which Accelerate's launcher passes on).
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvit_train.distributed import env
from fastvit_train.distributed.worker_processes import signal_when_parent_dies
from fastvit_train.utils.errors import Interrupted, Preempted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
INTERVAL = 0.25
"""seconds between two exchanges of the ranks, roughly"""
ECHO = 2.0
"""seconds within which a launcher may pass on a signal that its whole process group has received already"""
NOTICE = 1.0
"""seconds after a signal until a run that has not stopped yet says that it is about to"""


class StopTraining(Exception):
    """Raised on all ranks after the same batch: one of them has received a signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def stopped(signal_number: int, message: str) -> Preempted | Interrupted:
    """Return the error that a run ends with after this signal."""
    return (Interrupted if signal_number == signal.SIGINT else Preempted)(message)


class StopSignalHandler:
    """Context that notes the first of SIGNALS; a second one ends the process at once.

    Under a launcher the second one must come at least two seconds later: the first may arrive twice there, from the
    sender, if it signals the whole process group, and from the launcher, which passes it on.
    """

    def __init__(self) -> None:
        self.received = 0
        """number of the signal; 0 if there was none"""
        self._held: int | None = None
        self._before: dict[int, Any] = {}
        self._launched = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
            return self
        self._launched = env.launcher_command() is not None
        self._parent = os.getppid()
        # Python runs its handlers only after the current operator, but writes to this socket immediately.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._exit_on_second_signal, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        if self._launched:  # Accelerate's launcher of a single process dies on a signal without passing it on
            signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        if self._launched:
            signal_when_parent_dies(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        # This ends the thread. Closing would not: data loader workers that are still alive hold copies of the socket.
        self._writer.shutdown(socket.SHUT_RDWR)
        self._writer.close()
        self._thread.join()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    @property
    def reported(self) -> int:
        """Number of the signal that runs act on: inside `hold`, the one that was received before it."""
        return self.received if self._held is None else self._held

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep `reported` as it is inside the context, so that several runs see the same in their turns."""
        self._held = self.received
        try:
            yield
        finally:
            self._held = None

    def _exit_on_second_signal(self, reader: socket.socket) -> None:
        """End the process on the second signal; runs in a thread of its own, until the socket is closed."""
        first = None
        with reader:
            while received := self._receive(reader):
                number = received[0]
                if number not in SIGNALS:
                    continue
                if first is None:
                    first = time.monotonic()
                    reader.settimeout(NOTICE)
                elif not self._is_echo(first):
                    os._exit(128 + number)

    def _receive(self, reader: socket.socket) -> bytes:
        """Return the next signal's number as a byte; until then, say once that the run will stop, if it has not."""
        try:
            return reader.recv(1)
        except TimeoutError:
            reader.settimeout(None)
            if env.is_rank0():
                name = signal.Signals(self.received).name if self.received else "a signal"
                print(f"{name}: the run saves a checkpoint and stops; repeat it to end at once", file=sys.stderr)
            return reader.recv(1)

    def _is_echo(self, first: float) -> bool:
        """Whether a signal follows from the one at the time `first`: the launcher passed it on, or died of it."""
        if not self._launched:
            return False
        parent, self._parent = self._parent, os.getppid()
        return parent != self._parent or time.monotonic() - first <= ECHO


class StatusExchange:
    """Exchanges between all ranks, a few times a second, whether to stop; the batches in between cost nothing.

    All ranks count the same batches and agree on when the next exchange is due. So what one of them knows makes all of
    them act after the same batch.

    Args:
        accelerator: gives the device and the world size.
        stop_signals: knows whether this rank has received a signal.
    """

    def __init__(self, accelerator: Accelerator, stop_signals: StopSignalHandler) -> None:
        self._device = accelerator.device
        self._world_size = accelerator.num_processes
        self._stop_signals = stop_signals
        self._batches = 0
        self._last_exchange = 0  # in batches, as is the next
        self._next_exchange = 1
        self._last_time = time.perf_counter()

    def after_batch(self, is_nonfinite: Callable[[], Tensor] | None = None) -> bool:
        """Count a batch; if an exchange is due, share what this rank knows and learn what the others know.

        Args:
            is_nonfinite: returns a boolean scalar on the device: whether a loss of this rank is NaN or inf. It is only
                called if an exchange is due.

        Returns:
            False, on all ranks, if `is_nonfinite` holds on one of them.

        Raises:
            StopTraining: on all ranks, if one of them has received a signal.
        """
        self._batches += 1
        is_due = self._batches >= self._next_exchange
        if is_due or (self._world_size == 1 and self._stop_signals.reported):
            return self.exchange_now(is_nonfinite)
        return True

    def start_phase(self) -> None:
        """Exchange now and after the next batch: training and evaluation take different times per batch."""
        self.exchange_now()
        self._next_exchange = self._batches + 1

    def exchange_now(self, is_nonfinite: Callable[[], Tensor] | None = None) -> bool:
        """Exchange without waiting until it is due; otherwise as `after_batch`."""
        now = time.perf_counter()
        status = torch.tensor([self._stop_signals.reported, 0, self._batches_until_next(now)], device=self._device)
        if is_nonfinite is not None:
            status[1] = is_nonfinite()
        statuses = self._gather(status).tolist()
        signal_numbers, nonfinite, batches_until_next = zip(*statuses, strict=True)
        self._last_exchange, self._last_time = self._batches, now
        self._next_exchange = self._batches + min(batches_until_next)
        if any(signal_numbers):
            raise StopTraining(max(signal_numbers))
        return not any(nonfinite)

    def _gather(self, status: Tensor) -> Tensor:
        """Return the `status` (3,) of all ranks, (world size, 3)."""
        if self._world_size == 1:
            return status[None]
        statuses = status.new_empty(self._world_size, len(status))
        torch.distributed.all_gather(list(statuses), status)  # into a tensor, it is deprecated from torch 2.14 on
        return statuses

    def _batches_until_next(self, now: float) -> int:
        """Return how many batches this rank takes in INTERVAL, but at most twice those since the last exchange."""
        batches = self._batches - self._last_exchange
        if batches == 0:
            return 1
        seconds = max(now - self._last_time, 1e-9)
        return max(1, min(int(INTERVAL * batches / seconds), 2 * batches))

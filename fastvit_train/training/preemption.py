"""Being told to stop: signals are noted, the processes agree on the step, a checkpoint is written, and that is all.

SIGTERM is what schedulers, containers and torch's launcher send; SIGUSR1 is what SLURM sends ahead of a time limit
(`--signal=USR1@60`, or `TERM@60`, which accelerate's launcher hands on).
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from fastvit_train.distributed import env

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
INTERVAL = 0.25
"""seconds, about, between two exchanges of the processes"""
ECHO = 2.0
"""seconds in which a launcher passes on, by itself or by its death, the signal that its whole group was sent"""
PR_SET_PDEATHSIG = 1  # sys/prctl.h


class StopTraining(Exception):
    """Raised on all processes at the same step: a signal reached one of them."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)


class StopSignalHandler:
    """Notes the first SIGTERM or SIGUSR1 while it is entered; a second one ends the process at once.

    Under a launcher a second one counts from two seconds on, as the first may arrive twice there: from whoever
    signals the whole group, and from the launcher that passes it on.
    """

    def __init__(self) -> None:
        self.received = 0
        """the signal's number; 0 where there was none"""
        self._before: dict[int, Any] = {}
        self._launched = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # Python takes no signal handlers there
            return self
        self._launched = env.launcher_command() is not None
        # Python's handlers wait until an operator ends; the bytes that it writes to this socket don't.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, args=(reader,), name="signals", daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if self._launched:
            _signal_when_parent_dies(signal.SIGTERM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        if self._launched:
            _signal_when_parent_dies(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()  # this ends the thread
        self._thread.join()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _count(self, reader: socket.socket) -> None:
        first = None
        with reader:
            while received := reader.recv(1):
                now, number = time.monotonic(), received[0]
                if number not in SIGNALS:
                    continue
                if first is None:
                    first = now
                elif not self._launched or now - first > ECHO:
                    os._exit(128 + number)


def _signal_when_parent_dies(number: int) -> None:
    """Ask Linux for a signal when the launcher dies (0: for none): accelerate's dies of one without passing it on."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


class StatusExchange:
    """What the processes tell each other a few times a second; the steps in between cost no exchange, nor a wait.

    All of them count the same ticks, so that all of them act on what one of them knows after the same tick.
    """

    def __init__(self, accelerator: Accelerator, request: StopSignalHandler) -> None:
        self._device = accelerator.device
        self._alone = accelerator.num_processes == 1
        self._request = request
        self._ticks, self._agreed, self._due = 0, 0, 1
        self._last = time.perf_counter()

    def after_batch(self, is_nonfinite: Callable[[], Tensor] | None = None) -> bool:
        """Count a step; from time to time let all know whether to stop, or whether `is_nonfinite()` holds anywhere.

        Args:
            is_nonfinite: a boolean scalar on the device that tells whether the training has come to nothing.

        Returns:
            False, on all processes, where it is is_nonfinite on one of them.

        Raises:
            StopTraining: on all processes, where one of them was told to stop.
        """
        self._ticks += 1
        if self._ticks < self._due and not (self._alone and self._request.received):
            return True
        return self.exchange_now(is_nonfinite)

    def start_phase(self) -> None:
        """Exchange now, and again after the next tick: what begins may tick at another pace. See `after_batch`."""
        self.exchange_now()
        self._due = self._ticks + 1

    def exchange_now(self, is_nonfinite: Callable[[], Tensor] | None = None) -> bool:
        """The exchange itself, now; see `after_batch`."""
        now = time.perf_counter()
        passed, ticks = now - self._last, self._ticks - self._agreed
        affordable = int(INTERVAL * ticks / max(passed, 1e-9)) if ticks else 1
        wish = max(1, min(affordable, 2 * ticks))
        news = torch.tensor([self._request.received, 0, -wish], device=self._device)
        if is_nonfinite is not None:
            news[1] = is_nonfinite()
        if not self._alone:
            torch.distributed.all_reduce(news, torch.distributed.ReduceOp.MAX)
        signal_number, is_unsound, wish = news.tolist()
        self._last, self._agreed = now, self._ticks
        self._due = self._ticks - wish  # the smallest wish, its sign turned
        if signal_number:
            raise StopTraining(signal_number)
        return not is_unsound

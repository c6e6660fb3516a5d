"""The live progress bar."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvit_train.runs import train_state

REFRESH_SECONDS = 0.5


class ProgressBar:
    """Shows loss, accuracy, images/s and the time left if the output is a terminal, and otherwise nothing.

    Reading the loss makes the host wait for the device, so the bar reads it every half second, not every step.
    """

    def __init__(self, console: Console, total_steps: int, epochs: int, processes: int) -> None:
        self._epochs = epochs
        self._processes = processes
        self._shown = console.is_terminal and not console.quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # the refresh thread would interrupt the training loop ten times a second
            disable=not self._shown,
        )
        self._task = self._bar.add_task("epoch 1", total=total_steps, figures="")
        self._last = (time.perf_counter(), -1)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:  # rich up to 13 ends even a disabled bar with an empty line
            self._bar.stop()

    def update(self, state: train_state.TrainState, losses: Tensor, correct: Tensor, images_per_step: int) -> None:
        """Show this rank's mean loss (nats) and accuracy in the epoch so far, and the images/s of all ranks."""
        now = time.perf_counter()
        then, step = self._last
        if not self._shown or (step >= 0 and now - then < REFRESH_SECONDS):
            return
        self._last = (now, state.step)
        rate = images_per_step * (state.step - step) / (now - then) if step >= 0 else 0
        loss = float(losses[: state.step_in_epoch].mean())
        accuracy = float(correct) / (images_per_step / self._processes * state.step_in_epoch)
        self._bar.update(
            self._task,
            completed=state.step,
            description=f"epoch {state.epoch + 1}/{self._epochs}",
            refresh=True,
            figures=f"loss {loss:.3f}  acc {accuracy:.1%}  {rate:,.0f} img/s",
        )

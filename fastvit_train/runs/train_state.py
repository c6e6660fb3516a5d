"""The state of a run that is neither in the model nor in the optimizer."""

from dataclasses import dataclass, field

from fastvit_train.utils.gpu_monitor import Usage


@dataclass
class TrainState:
    """How far a run has come. With the configuration it determines the order of the data that follows."""

    epoch: int = 0
    """epochs completed"""
    step_in_epoch: int = 0
    """optimizer steps taken in the epoch under way"""
    step: int = 0
    """optimizer steps taken in total"""
    train_seconds: float = 0.0
    """training time of the completed epochs"""
    eval_seconds: float = 0.0
    """evaluation time of the completed epochs"""
    epochs_to_target: int | None = None
    """epochs completed when an evaluation first reached the target accuracy"""
    seconds_to_target: float | None = None
    """training and evaluation time until then"""
    skipped_steps: int = 0
    """optimizer steps that the gradient scaler of fp16 skipped because of an overflow, in total"""
    best_accuracy: float = -1.0
    """the highest of the completed epochs"""
    best_score: float | None = None
    """what is largest after the best epoch, by --keep-best-of; None before the first epoch is completed"""
    best_step: int = -1
    """optimizer steps taken when the best epoch was completed"""
    epoch_losses: list[float] = field(default_factory=list)
    """loss of each step of the epoch under way, nats, mean over all ranks"""
    epoch_correct: float = 0.0
    """training images classified correctly in the epoch under way, over all ranks"""
    epoch_seconds: float = 0.0
    """training time of the epoch under way"""
    energy_joules: float | None = 0.0
    """energy of the GPUs during `train_seconds`; None if a part of it was not measured"""
    busy_seconds: float | None = 0.0
    """time during `train_seconds` in which the GPUs were busy, mean over the GPUs"""
    energy_unmeasured: str | None = None
    """why the energy was not measured"""
    epoch_joules: float | None = 0.0
    epoch_busy_seconds: float | None = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError if the values, which may come from a file, are not numbers or contradict each other."""
        counts = (self.epoch, self.step_in_epoch, self.step, self.skipped_steps)
        seconds = (self.train_seconds, self.eval_seconds, self.epoch_seconds, self.epoch_correct, self.best_accuracy)
        if not all(type(count) is int and count >= 0 for count in counts) or self.step < self.step_in_epoch:
            raise ValueError(f"epoch, step in the epoch, step and skipped steps cannot be {counts}")
        if not all(isinstance(value, int | float) for value in (*seconds, *self.epoch_losses, self.best_step)):
            raise ValueError("a value that must be a number is not one")
        if self.best_score is None and self.best_step >= 0:  # a version that kept the best one of the accuracy only
            self.best_score = self.best_accuracy
        if len(self.epoch_losses) != self.step_in_epoch:
            raise ValueError(f"{len(self.epoch_losses)} losses for {self.step_in_epoch} steps")

    def add_usage(self, usage: Usage) -> None:
        """Add time and energy to those of the epoch under way."""
        self.epoch_seconds += usage.seconds
        self.energy_unmeasured = self.energy_unmeasured or usage.unmeasured
        self.epoch_joules = _add(self.epoch_joules, usage.joules)
        self.epoch_busy_seconds = _add(self.epoch_busy_seconds, usage.busy_seconds)

    @property
    def epoch_usage(self) -> Usage:
        """The GPUs' usage in the epoch under way."""
        return self._usage(self.epoch_seconds, self.epoch_joules, self.epoch_busy_seconds)

    @property
    def usage(self) -> Usage:
        """The GPUs' usage in the completed epochs."""
        return self._usage(self.train_seconds, self.energy_joules, self.busy_seconds)

    def _usage(self, seconds: float, joules: float | None, busy_seconds: float | None) -> Usage:
        utilization = busy_seconds / seconds if seconds and busy_seconds is not None else None
        return Usage(seconds, joules, utilization, unmeasured=self.energy_unmeasured)

    def close_epoch(self) -> None:
        """Complete the epoch under way: add its totals to those of the run, and reset them."""
        self.epoch += 1
        self.train_seconds += self.epoch_seconds
        self.energy_joules = _add(self.energy_joules, self.epoch_joules)
        self.busy_seconds = _add(self.busy_seconds, self.epoch_busy_seconds)
        self.step_in_epoch, self.epoch_losses, self.epoch_correct = 0, [], 0.0
        self.epoch_seconds, self.epoch_joules, self.epoch_busy_seconds = 0.0, 0.0, 0.0

    def add_evaluation(self, accuracy: float, score: float, seconds: float, target: float | None) -> bool:
        """Add the evaluation after the last completed epoch; returns whether it is the first to reach `target`.

        The epoch with the highest `score` is the best one.
        """
        self.eval_seconds += seconds
        self.best_accuracy = max(self.best_accuracy, accuracy)
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step = score, self.step
        return self.reaches(accuracy, target)

    def reaches(self, accuracy: float, target: float | None) -> bool:
        """Note epochs and seconds if this is the first accuracy that reaches `target`; returns whether it is."""
        if target is None or accuracy < target or self.epochs_to_target is not None:
            return False
        self.epochs_to_target, self.seconds_to_target = self.epoch, self.train_seconds + self.eval_seconds
        return True


def _add(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more

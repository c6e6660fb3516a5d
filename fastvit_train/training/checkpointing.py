"""When the training loop saves a checkpoint, and what happens if it cannot be saved."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastvit_train.distributed import sync
from fastvit_train.distributed.parallelize import full_tensor
from fastvit_train.runs import checkpoint
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError, UserError


def save_checkpoint(session: TrainSession) -> None:
    """Save a checkpoint of the run, after the metrics of the steps before it; call it on all ranks.

    Raises:
        SaveError: if they cannot be written, unless --on-save-error is "continue".
        UserError: if a weight is NaN or inf: the checkpoint would be useless, and no loss has shown it yet.
    """
    sync.run_on_all_ranks(session.accelerator, lambda: _check_weights(session))
    with apply_save_error_policy(session):
        sync.run_on_all_ranks(session.accelerator, lambda: _flush_metrics(session))
        checkpoint.save(
            session.folder.checkpoints,
            session.accelerator,
            session.scheduler.optimizer,
            session.state,
            session.dataset.identity() | session.loss.identity(),
            session.config.run.keep,
        )


@contextmanager
def apply_save_error_policy(session: TrainSession) -> Iterator[None]:
    """Stop the run or log the error and continue, as --on-save-error asks for, if a SaveError is raised inside."""
    try:
        yield
    except SaveError as error:
        message = f"{error} at step {session.state.step}; {name_last_checkpoint(session)}"
        if session.config.run.on_save_error == "stop":
            remedy = "free disk space" if error.disk_is_full else "check that the disk can be written"
            raise SaveError(
                f"{message}; {remedy} and continue with --resume auto, "
                "or ignore such errors with --on-save-error continue"
            ) from None
        session.log.line(f"{message}; training continues (--on-save-error continue)")


def name_last_checkpoint(session: TrainSession) -> str:
    """Return the end of an error message: which checkpoint the run can be resumed from."""
    path = checkpoint.newest(session.folder.checkpoints)
    return "there is no checkpoint yet" if path is None else f"the last good checkpoint is {path}"


def _check_weights(session: TrainSession) -> None:
    for name, weight in session.bare_model.named_parameters():
        if not full_tensor(weight.detach()).isfinite().all():
            raise UserError(
                f"{name} is NaN or inf after step {session.state.step} (epoch {session.state.epoch + 1}); "
                f"lower --lr (now {session.config.optim.lr}) or set --clip-grad; {name_last_checkpoint(session)}"
            )


def _flush_metrics(session: TrainSession) -> None:
    with atomic_io.as_save_error(f"the metrics of {session.folder.root} could not be written"):
        session.metrics_buffer.flush()

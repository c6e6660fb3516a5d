"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from fastvit_train.config import recipes
from fastvit_train.config.overrides import override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import sync
from fastvit_train.distributed.parallelize import full_tensor
from fastvit_train.models.evaluator import Evaluation, evaluate_model
from fastvit_train.runs import checkpoint
from fastvit_train.runs.run_folder import ResumeMode
from fastvit_train.training import metrics
from fastvit_train.training.preemption import Preempted, StopSignalHandler, StopTraining
from fastvit_train.training.progress_bar import ProgressBar
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError, UserError

Phase = Callable[[str], AbstractContextManager[Any]]
Batch = tuple[Tensor, Tensor]


def train(
    recipe: str = "quickstart", *, resume: ResumeMode = "never", overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train a model and write its run folder, `runs_dir/exp_name`; returns what summary.json holds.

    Accuracies in it are fractions, losses nats, times seconds; what was not measured is None.

    Args:
        recipe: named settings to start from, as in `python -m fastvit_train recipes`.
        resume: "auto" goes on from the run's last checkpoint if there is one, "must" insists on it.
        overwrite: start over where the folder holds a run already.
        settings: by the flags' names, with _ for -: `epochs=3, model="c_vit_4_4_32", exp_name="try"`.

    Raises:
        UserError: for anything wrong with the settings, the data, the launch or the run's folder.
        Preempted: where SIGTERM or SIGUSR1 told the run to stop; its checkpoint is written.
    """
    config = override(recipes.recipe(recipe), settings, "train()")
    return fit(config, resume=resume, overwrite=overwrite)


def fit(config: TrainConfig, *, resume: ResumeMode = "never", overwrite: bool = False) -> dict[str, Any]:
    """Train the model that `config` describes and write its run folder; returns what summary.json holds.

    Args:
        config: the run; see `fastvit_train.config`.
        resume: "auto" goes on from the run's last checkpoint if there is one, "must" insists on it.
        overwrite: start over where the folder holds a run already.

    Raises:
        UserError: for anything wrong with the configuration, the data, the launch or the run's folder.
        Preempted: where SIGTERM or SIGUSR1 told the run to stop; its checkpoint is written.
    """
    with StopSignalHandler() as stop_signals:
        try:
            session = setup(config, resume, overwrite, stop_signals)
        except Exception as error:  # such as a compiler that the same signal ended
            if stop_signals.received and not isinstance(error, UserError):
                raise Preempted(f"stopped before the first step, by which came {error!r}") from error
            raise
        try:
            return _train(session)
        except UserError:
            if session.accelerator.is_main_process:
                session.folder.remove_unless_resumable()
            raise
        finally:
            session.close()


def _train(session: TrainSession) -> dict[str, Any]:
    config, state = session.config, session.state
    last_epoch = config.last_epoch
    total_steps = config.run.epochs * session.train_loader.steps_per_epoch
    metrics.start_trackers(session)
    evaluation = None
    try:
        with ProgressBar(session.log.console, total_steps, config.run.epochs, session.accelerator.num_processes) as bar:
            while state.epoch < last_epoch:
                session.status_exchange.start_phase()
                train_epoch(session, bar)
                session.status_exchange.start_phase()
                started = time.perf_counter()
                evaluation = evaluate_model(
                    session.eval_model, session.eval_loader, session.accelerator, session.status_exchange.after_batch
                )
                _close_epoch(session, evaluation, eval_seconds=time.perf_counter() - started)
    except StopTraining as stop:
        raise Preempted(_stop(session, stop)) from None
    if evaluation is None:  # resumed, with nothing left to train
        evaluation = evaluate_model(session.eval_model, session.eval_loader, session.accelerator)
    summary = metrics.finish(session, evaluation)
    metrics.finish_trackers(session)
    return summary


def train_epoch(session: TrainSession, bar: ProgressBar, phase: Phase = record_function) -> None:
    """Train to the end of the epoch under way; `session.state` keeps the step, the losses and the time.

    Each part of a step runs within `phase(its name)`: "input", "forward", "backward", "optimizer"; where the
    host waits for the device, a few times a second and at the epoch's end, within "waiting".
    """
    config, state = session.config, session.state
    steps = session.train_loader.steps_per_epoch
    losses, correct = _restore_sums(session)
    micro_batches = session.train_loader.micro_batches(state.epoch, state.step_in_epoch)
    session.model.train()
    session.meter.start()
    while state.step_in_epoch < steps:
        _train_step(session, micro_batches, losses, correct, phase)
        bar.update(state, losses, correct, session.batch_size)
        if config.run.save_every and state.step % config.run.save_every == 0 and state.step_in_epoch < steps:
            _settle(session, losses, correct)
            save_checkpoint(session)
            session.meter.start()
        with phase("waiting"):
            try:
                sound = session.status_exchange.after_batch(lambda: ~losses.isfinite().all())
            except StopTraining:
                _settle(session, losses, correct)
                raise
            if not sound:
                break  # _settle says at which step
    with phase("waiting"):
        _settle(session, losses, correct)


def _train_step(
    session: TrainSession, micro_batches: Iterator[Batch], losses: Tensor, correct: Tensor, phase: Phase
) -> None:
    """Take one optimizer step; adds to the epoch's `losses` (steps,) and right answers `correct` ()."""
    config, accelerator, state, model = session.config, session.accelerator, session.state, session.model
    for _ in range(config.optim.grad_accum):
        with phase("input"):
            images, labels = next(micro_batches)
        with accelerator.accumulate(model):
            with phase("forward"):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.optim.label_smoothing)
            with phase("backward"):
                accelerator.backward(loss)
            with phase("optimizer"):
                if config.optim.clip_grad is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
                session.optimizer.step()
                session.optimizer.zero_grad()
        losses[state.step_in_epoch] += loss.detach() / config.optim.grad_accum
        correct += (logits.detach().argmax(1) == labels).sum()
    state.step += 1
    state.step_in_epoch += 1
    state.skipped_steps += session.optimizer.step_was_skipped
    session.scheduler.step_update(state.step)
    if session.ema is not None:
        with phase("optimizer"):
            session.ema.update(session.bare_model, state.step)


def save_checkpoint(session: TrainSession) -> None:
    """Write a checkpoint of the run as it stands, and the lines of metrics that came before it.

    Raises:
        SaveError: where they can't be written, unless the run is to go on then.
        UserError: where the weights are no numbers any more, which the next step's loss would tell too late.
    """
    sync.run_on_all_ranks(session.accelerator, lambda: _check_weights(session))
    with _as_the_run_wants(session):
        sync.run_on_all_ranks(session.accelerator, lambda: _flush(session))
        checkpoint.save(
            session.folder.checkpoints,
            session.accelerator,
            session.scheduler,
            session.state,
            session.dataset.identity(),
            session.config.run.keep,
        )


def _check_weights(session: TrainSession) -> None:
    for name, weight in session.bare_model.named_parameters():
        if not full_tensor(weight.detach()).isfinite().all():
            raise UserError(
                f"{name} holds infinite or no numbers after step {session.state.step} "
                f"(epoch {session.state.epoch + 1}); "
                f"lower --lr (now {session.config.optim.lr}) or set --clip-grad; {_last_good(session)}"
            )


def _flush(session: TrainSession) -> None:
    with atomic_io.as_save_error(f"{session.folder.root} takes no metrics"):
        session.journal.flush()


@contextmanager
def _as_the_run_wants(session: TrainSession) -> Iterator[None]:
    """Where the disk is full, stop or say so and train on, as --on-save-error has it."""
    try:
        yield
    except SaveError as error:
        what = f"{error} at step {session.state.step}; {_last_good(session)}"
        if session.config.run.on_save_error == "stop":
            how = "make room and go on with --resume auto, or train on with --on-save-error continue"
            raise SaveError(f"{what}; {how}") from None
        session.log.line(f"{what}; training on (--on-save-error continue)")


def _last_good(session: TrainSession) -> str:
    path = checkpoint.newest(session.folder.checkpoints)
    return "there is no checkpoint yet" if path is None else f"the last good checkpoint is {path}"


def _stop(session: TrainSession, stop: StopTraining) -> str:
    """Write the checkpoint that a run told to stop leaves; returns what is said of it."""
    save_checkpoint(session)
    return f"{stop} at step {session.state.step}; {_last_good(session)}, --resume auto goes on from there"


def _restore_sums(session: TrainSession) -> tuple[Tensor, Tensor]:
    """This process's share of the epoch's losses (steps,) and right answers, as they stood at `session.state`."""
    losses = torch.zeros(session.train_loader.steps_per_epoch, device=session.accelerator.device)
    losses[: len(session.state.epoch_losses)] = torch.tensor(session.state.epoch_losses)
    correct = torch.zeros((), device=session.accelerator.device)
    if session.accelerator.is_main_process:
        correct += session.state.epoch_correct
    return losses, correct


def _settle(session: TrainSession, losses: Tensor, correct: Tensor) -> None:
    """Bring the epoch's sums of all processes and what it took into `session.state`; the one host synchronisation.

    Raises:
        UserError: naming the first step whose loss is not a finite number, and what it was taken on.
    """
    state = session.state
    done = losses[: state.step_in_epoch]
    state.epoch_losses = session.accelerator.reduce(done, "mean").tolist()
    state.epoch_correct = float(session.accelerator.reduce(correct, "sum"))
    state.spend(sync.sum_usage_over_ranks(session.accelerator, session.meter, session.meter.stop()))
    for place, loss in enumerate(state.epoch_losses):
        if not math.isfinite(loss):
            raise UserError(_not_finite(session, place, loss))


def _not_finite(session: TrainSession, place: int, loss: float) -> str:
    """What is to be known of the step at `place` in the epoch, whose loss is no number."""
    state = session.state
    samples = session.train_loader.sample_order(state.epoch)[place].flatten().tolist()
    step = state.step - state.step_in_epoch + place + 1
    session.scheduler.step_update(step - 1)  # back to the rate that the step was taken with
    return (
        f"the loss became {loss} at step {step} "
        f"(epoch {state.epoch + 1}, learning rate {session.optimizer.param_groups[0]['lr']:g}); "
        f"lower --lr (now {session.config.optim.lr}) or set --clip-grad; {_last_good(session)}; "
        f"training images of that batch, by index: {' '.join(map(str, samples))}"
    )


def _close_epoch(session: TrainSession, evaluation: Evaluation, eval_seconds: float) -> None:
    """Record the epoch that was just trained and evaluated, and save a checkpoint behind it."""
    state, run = session.state, session.config.run
    metrics.record_epoch(session, evaluation, eval_seconds)
    state.close_epoch()
    if state.evaluated(evaluation.accuracy, eval_seconds, run.target_accuracy):
        metrics.tell_target(session)
    save_checkpoint(session)
    if run.save_model_every and state.epoch % run.save_model_every == 0:
        with _as_the_run_wants(session):
            metrics.write_weights(session, f"model_epoch_{state.epoch}.safetensors")

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
from fastvit_train.runs.run_folder import Resume
from fastvit_train.training import metrics
from fastvit_train.training.preemption import Preempted, Stop, StopRequest
from fastvit_train.training.progress_bar import ProgressBar
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError, UserError

Phase = Callable[[str], AbstractContextManager[Any]]
Batch = tuple[Tensor, Tensor]


def train(
    recipe: str = "quickstart", *, resume: Resume = "never", overwrite: bool = False, **settings: Any
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


def fit(config: TrainConfig, *, resume: Resume = "never", overwrite: bool = False) -> dict[str, Any]:
    """Train the model that `config` describes and write its run folder; returns what summary.json holds.

    Args:
        config: the run; see `fastvit_train.config`.
        resume: "auto" goes on from the run's last checkpoint if there is one, "must" insists on it.
        overwrite: start over where the folder holds a run already.

    Raises:
        UserError: for anything wrong with the configuration, the data, the launch or the run's folder.
        Preempted: where SIGTERM or SIGUSR1 told the run to stop; its checkpoint is written.
    """
    with StopRequest() as stop_request:
        try:
            job = setup(config, resume, overwrite, stop_request)
        except Exception as error:  # such as a compiler that the same signal ended
            if stop_request.received and not isinstance(error, UserError):
                raise Preempted(f"stopped before the first step, by which came {error!r}") from error
            raise
        try:
            return _train(job)
        except UserError:
            if job.accelerator.is_main_process:
                job.folder.remove_unless_resumable()
            raise
        finally:
            job.close()


def _train(job: TrainSession) -> dict[str, Any]:
    config, progress = job.config, job.progress
    last_epoch = config.last_epoch
    total_steps = config.run.epochs * job.train_loader.steps_per_epoch
    metrics.start_trackers(job)
    evaluation = None
    try:
        with ProgressBar(job.log.console, total_steps, config.run.epochs, job.accelerator.num_processes) as bar:
            while progress.epoch < last_epoch:
                job.watch.begin()
                train_epoch(job, bar)
                job.watch.begin()
                started = time.perf_counter()
                evaluation = evaluate_model(job.eval_model, job.eval_loader, job.accelerator, job.watch.tick)
                _close_epoch(job, evaluation, eval_seconds=time.perf_counter() - started)
    except Stop as stop:
        raise Preempted(_stop(job, stop)) from None
    if evaluation is None:  # resumed, with nothing left to train
        evaluation = evaluate_model(job.eval_model, job.eval_loader, job.accelerator)
    summary = metrics.finish(job, evaluation)
    metrics.finish_trackers(job)
    return summary


def train_epoch(job: TrainSession, bar: ProgressBar, phase: Phase = record_function) -> None:
    """Train to the end of the epoch under way; `job.progress` keeps the step, the losses and the time.

    Each part of a step runs within `phase(its name)`: "input", "forward", "backward", "optimizer"; where the
    host waits for the device, a few times a second and at the epoch's end, within "waiting".
    """
    config, progress = job.config, job.progress
    steps = job.train_loader.steps_per_epoch
    losses, correct = _restore_sums(job)
    micro_batches = job.train_loader.micro_batches(progress.epoch, progress.step_in_epoch)
    job.model.train()
    job.meter.start()
    while progress.step_in_epoch < steps:
        _train_step(job, micro_batches, losses, correct, phase)
        bar.update(progress, losses, correct, job.batch_size)
        if config.run.save_every and progress.step % config.run.save_every == 0 and progress.step_in_epoch < steps:
            _settle(job, losses, correct)
            save_checkpoint(job)
            job.meter.start()
        with phase("waiting"):
            try:
                sound = job.watch.tick(lambda: ~losses.isfinite().all())
            except Stop:
                _settle(job, losses, correct)
                raise
            if not sound:
                break  # _settle says at which step
    with phase("waiting"):
        _settle(job, losses, correct)


def _train_step(
    job: TrainSession, micro_batches: Iterator[Batch], losses: Tensor, correct: Tensor, phase: Phase
) -> None:
    """Take one optimizer step; adds to the epoch's `losses` (steps,) and right answers `correct` ()."""
    config, accelerator, progress, model = job.config, job.accelerator, job.progress, job.model
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
                job.optimizer.step()
                job.optimizer.zero_grad()
        losses[progress.step_in_epoch] += loss.detach() / config.optim.grad_accum
        correct += (logits.detach().argmax(1) == labels).sum()
    progress.step += 1
    progress.step_in_epoch += 1
    progress.skipped_steps += job.optimizer.step_was_skipped
    job.scheduler.step_update(progress.step)
    if job.ema is not None:
        with phase("optimizer"):
            job.ema.update(job.bare_model, progress.step)


def save_checkpoint(job: TrainSession) -> None:
    """Write a checkpoint of the run as it stands, and the lines of metrics that came before it.

    Raises:
        SaveError: where they can't be written, unless the run is to go on then.
        UserError: where the weights are no numbers any more, which the next step's loss would tell too late.
    """
    sync.run_on_all_ranks(job.accelerator, lambda: _check_weights(job))
    with _as_the_run_wants(job):
        sync.run_on_all_ranks(job.accelerator, lambda: _flush(job))
        checkpoint.save(
            job.folder.checkpoints,
            job.accelerator,
            job.scheduler,
            job.progress,
            job.dataset.identity(),
            job.config.run.keep,
        )


def _check_weights(job: TrainSession) -> None:
    for name, weight in job.bare_model.named_parameters():
        if not full_tensor(weight.detach()).isfinite().all():
            raise UserError(
                f"{name} holds infinite or no numbers after step {job.progress.step} (epoch {job.progress.epoch + 1}); "
                f"lower --lr (now {job.config.optim.lr}) or set --clip-grad; {_last_good(job)}"
            )


def _flush(job: TrainSession) -> None:
    with atomic_io.as_save_error(f"{job.folder.root} takes no metrics"):
        job.journal.flush()


@contextmanager
def _as_the_run_wants(job: TrainSession) -> Iterator[None]:
    """Where the disk is full, stop or say so and train on, as --on-save-error has it."""
    try:
        yield
    except SaveError as error:
        what = f"{error} at step {job.progress.step}; {_last_good(job)}"
        if job.config.run.on_save_error == "stop":
            how = "make room and go on with --resume auto, or train on with --on-save-error continue"
            raise SaveError(f"{what}; {how}") from None
        job.log.line(f"{what}; training on (--on-save-error continue)")


def _last_good(job: TrainSession) -> str:
    path = checkpoint.newest(job.folder.checkpoints)
    return "there is no checkpoint yet" if path is None else f"the last good checkpoint is {path}"


def _stop(job: TrainSession, stop: Stop) -> str:
    """Write the checkpoint that a run told to stop leaves; returns what is said of it."""
    save_checkpoint(job)
    return f"{stop} at step {job.progress.step}; {_last_good(job)}, --resume auto goes on from there"


def _restore_sums(job: TrainSession) -> tuple[Tensor, Tensor]:
    """This process's share of the epoch's losses (steps,) and right answers, as they stood at `job.progress`."""
    losses = torch.zeros(job.train_loader.steps_per_epoch, device=job.accelerator.device)
    losses[: len(job.progress.epoch_losses)] = torch.tensor(job.progress.epoch_losses)
    correct = torch.zeros((), device=job.accelerator.device)
    if job.accelerator.is_main_process:
        correct += job.progress.epoch_correct
    return losses, correct


def _settle(job: TrainSession, losses: Tensor, correct: Tensor) -> None:
    """Bring the epoch's sums of all processes and what it took into `job.progress`; the one host synchronisation.

    Raises:
        UserError: naming the first step whose loss is not a finite number, and what it was taken on.
    """
    progress = job.progress
    done = losses[: progress.step_in_epoch]
    progress.epoch_losses = job.accelerator.reduce(done, "mean").tolist()
    progress.epoch_correct = float(job.accelerator.reduce(correct, "sum"))
    progress.spend(sync.sum_usage_over_ranks(job.accelerator, job.meter, job.meter.stop()))
    for place, loss in enumerate(progress.epoch_losses):
        if not math.isfinite(loss):
            raise UserError(_not_finite(job, place, loss))


def _not_finite(job: TrainSession, place: int, loss: float) -> str:
    """What is to be known of the step at `place` in the epoch, whose loss is no number."""
    progress = job.progress
    samples = job.train_loader.sample_order(progress.epoch)[place].flatten().tolist()
    step = progress.step - progress.step_in_epoch + place + 1
    job.scheduler.step_update(step - 1)  # back to the rate that the step was taken with
    return (
        f"the loss became {loss} at step {step} "
        f"(epoch {progress.epoch + 1}, learning rate {job.optimizer.param_groups[0]['lr']:g}); "
        f"lower --lr (now {job.config.optim.lr}) or set --clip-grad; {_last_good(job)}; "
        f"training images of that batch, by index: {' '.join(map(str, samples))}"
    )


def _close_epoch(job: TrainSession, evaluation: Evaluation, eval_seconds: float) -> None:
    """Record the epoch that was just trained and evaluated, and save a checkpoint behind it."""
    progress, run = job.progress, job.config.run
    metrics.record_epoch(job, evaluation, eval_seconds)
    progress.close_epoch()
    if progress.evaluated(evaluation.accuracy, eval_seconds, run.target_accuracy):
        metrics.tell_target(job)
    save_checkpoint(job)
    if run.save_model_every and progress.epoch % run.save_model_every == 0:
        with _as_the_run_wants(job):
            metrics.write_weights(job, f"model_epoch_{progress.epoch}.safetensors")

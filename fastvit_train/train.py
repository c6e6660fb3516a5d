"""The training loop."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from fastvit_train import checkpoint, report, telemetry
from fastvit_train.config import TrainConfig
from fastvit_train.errors import UserError
from fastvit_train.evaluate import Evaluation, evaluate
from fastvit_train.progress import ProgressBar
from fastvit_train.setup import Job, setup
from fastvit_train.tracking import Resume

Phase = Callable[[str], AbstractContextManager[Any]]


def fit(config: TrainConfig, *, resume: Resume = "never", overwrite: bool = False) -> dict[str, Any]:
    """Train the model that `config` describes and write its run folder; returns what summary.json holds.

    Args:
        config: the run; see `fastvit_train.config`.
        resume: "auto" goes on from the run's last checkpoint if there is one, "must" insists on it.
        overwrite: start over where the folder holds a run already.

    Raises:
        UserError: for anything wrong with the configuration, the data, the launch or the run's folder.
    """
    job = setup(config, resume, overwrite)
    try:
        return _train(job)
    except UserError:
        if job.accelerator.is_main_process:
            job.folder.remove_unless_resumable()
        raise


def _train(job: Job) -> dict[str, Any]:
    config, progress = job.config, job.progress
    last_epoch = min(config.run.epochs, config.run.stop_after or config.run.epochs)
    total_steps = config.run.epochs * job.train_loader.steps_per_epoch
    report.start_trackers(job)
    evaluation = None
    with ProgressBar(job.log.console, total_steps, config.run.epochs, job.accelerator.num_processes) as bar:
        while progress.epoch < last_epoch:
            train_epoch(job, bar)
            started = time.perf_counter()
            evaluation = evaluate(job.model, job.eval_loader, job.accelerator)
            _close_epoch(job, evaluation, eval_seconds=time.perf_counter() - started)
    if evaluation is None:  # resumed, with nothing left to train
        evaluation = evaluate(job.model, job.eval_loader, job.accelerator)
    summary = report.finish(job, evaluation)
    report.finish_trackers(job)
    return summary


def train_epoch(job: Job, bar: ProgressBar, phase: Phase = record_function) -> None:
    """Train to the end of the epoch under way; `job.progress` keeps the step, the losses and the time.

    Each part of a step runs within `phase(its name)`: "input", "forward", "backward", "optimizer"; the epoch's end,
    where the host waits for the device, within "waiting".
    """
    config, accelerator, progress, model = job.config, job.accelerator, job.progress, job.model
    steps = job.train_loader.steps_per_epoch
    losses, correct = _restore_sums(job)
    micro_batches = job.train_loader.micro_batches(progress.epoch, progress.step_in_epoch)
    model.train()
    job.meter.start()
    while progress.step_in_epoch < steps:
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
        job.scheduler.step_update(progress.step)
        bar.update(progress, losses, correct, job.batch_size)
        if config.run.save_every and progress.step % config.run.save_every == 0 and progress.step_in_epoch < steps:
            _settle(job, losses, correct)
            save_checkpoint(job)
            job.meter.start()
    with phase("waiting"):
        _settle(job, losses, correct)


def save_checkpoint(job: Job) -> None:
    """Write a checkpoint of the run as it stands."""
    checkpoint.save(job.folder.checkpoints, job.accelerator, job.scheduler, job.progress, job.dataset.identity())


def _restore_sums(job: Job) -> tuple[Tensor, Tensor]:
    """This process's share of the epoch's losses (steps,) and right answers, as they stood at `job.progress`."""
    losses = torch.zeros(job.train_loader.steps_per_epoch, device=job.accelerator.device)
    losses[: len(job.progress.epoch_losses)] = torch.tensor(job.progress.epoch_losses)
    correct = torch.zeros((), device=job.accelerator.device)
    if job.accelerator.is_main_process:
        correct += job.progress.epoch_correct
    return losses, correct


def _settle(job: Job, losses: Tensor, correct: Tensor) -> None:
    """Bring the epoch's sums of all processes and what it took into `job.progress`; the one host synchronisation.

    Raises:
        UserError: naming the first step whose loss is not a finite number.
    """
    progress = job.progress
    done = losses[: progress.step_in_epoch]
    progress.epoch_losses = job.accelerator.reduce(done, "mean").tolist()
    progress.epoch_correct = float(job.accelerator.reduce(correct, "sum"))
    progress.spend(telemetry.together(job.accelerator, job.meter, job.meter.stop()))
    for step, loss in enumerate(progress.epoch_losses, start=progress.step - len(progress.epoch_losses) + 1):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {step} (epoch {progress.epoch + 1}); "
                f"lower --lr (now {job.config.optim.lr}) or set --clip-grad; "
                f"{job.folder.checkpoints}/last is the last good checkpoint, if there is one"
            )


def _close_epoch(job: Job, evaluation: Evaluation, eval_seconds: float) -> None:
    """Record the epoch that was just trained and evaluated, and save a checkpoint behind it."""
    progress, run = job.progress, job.config.run
    report.record_epoch(job, evaluation, eval_seconds)
    progress.close_epoch()
    if progress.evaluated(evaluation.accuracy, eval_seconds, run.target_accuracy):
        report.tell_target(job)
    save_checkpoint(job)
    if run.save_model_every and progress.epoch % run.save_model_every == 0:
        report.write_weights(job, f"model_epoch_{progress.epoch}.safetensors")

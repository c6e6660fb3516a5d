"""Lines that a run logs, and files that it writes: metrics, and at the end summary, weights for timm and curves."""

import json
import platform
import shlex
from itertools import accumulate
from typing import Any

import accelerate
import timm
import torch
from safetensors.torch import save_file

from fastvit_train.config.init_from import FINAL
from fastvit_train.config.overrides import flatten
from fastvit_train.config.timm_config import write_timm_config
from fastvit_train.data.balance import majority_share
from fastvit_train.data.rendering import Rendering
from fastvit_train.distributed import sync
from fastvit_train.distributed.accelerator import device_name, emulates_bf16
from fastvit_train.models.evaluator import Evaluation
from fastvit_train.runs import findings
from fastvit_train.runs.comparison import table
from fastvit_train.runs.plots.curves import plot_curves
from fastvit_train.runs.results import read_runs
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.optim.final_weights import is_out_of_patience
from fastvit_train.training.optim.optimizer import has_momentum, peak_lr
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import atomic_io, memory
from fastvit_train.utils.errors import counted
from fastvit_train.utils.gpu_monitor import Usage
from fastvit_train.utils.safe_load import read_json

TRACKER_PROJECT = "fastvit_train"


def start_trackers(session: TrainSession) -> None:
    """Start the trackers of --track with the configuration, without None and lists, which TensorBoard rejects."""
    if session.config.run.track:
        scalars = {k: v for k, v in flatten(session.config.settings).items() if isinstance(v, bool | int | float | str)}
        session.accelerator.init_trackers(TRACKER_PROJECT, config=scalars)


def finish_trackers(session: TrainSession) -> None:
    """Finish the trackers; the ranks stay connected for another run."""
    for tracker in session.accelerator.trackers:
        tracker.finish()


def log_introduction(session: TrainSession, threads: str, resuming: bool, messages: list[str]) -> None:
    """Log what is about to be trained, on what, and how."""
    config, accelerator, dataset, log = session.config, session.accelerator, session.dataset, session.log
    parameters = sum(p.numel() for p in session.bare_model.parameters())
    block = "" if config.model.block == "torch" else f", block {config.model.block}"
    log.line(f"{config.model.model}: {counted(parameters, 'parameter')}, attention {config.model.attention}{block}")
    if config.model.weights is not None and not resuming:
        log.line(f"initialized from {config.model.weights}")
    if config.optim.freeze:
        trained = sum(p.numel() for p in session.bare_model.parameters() if p.requires_grad)
        log.line(f"{trained:,} of them are trained: {counted(config.optim.freeze, 'layer')} frozen")
    for line in messages:
        log.line(line)
    if session.compile_seconds is not None:
        compiled = "model" if config.run.compile else "kernels"
        log.line(f"first passes, including compilation of the {compiled}: {session.compile_seconds:.1f} s")
    log.line(
        f"{dataset.name}: {counted(len(dataset.train.labels), 'training image')}, "
        f"{counted(len(dataset.test.labels), 'evaluation image')} ({dataset.evaluated_on}), "
        f"{counted(len(dataset.classes), 'class')}; always guessing the most frequent one is right for "
        f"{majority_share(dataset.test.labels):.2%}"
    )
    for line in dataset.notes:
        log.line(line)
    log.line(
        f"{device_name(accelerator.device)}; world size {accelerator.num_processes}; "
        f"mixed precision {accelerator.mixed_precision}; {threads}"
    )
    if emulates_bf16(accelerator):
        log.line("warning: this processor computes bf16 by emulation, which is slower than fp32: leave bf16 out")
    momentum, optimizer = config.optim.momentum, config.optim.optimizer
    if momentum is not None and not has_momentum(optimizer):
        log.line(f"warning: --momentum {momentum:g} has no effect: {optimizer} has no momentum")
    if session.batch_size != config.run.batch_size:
        log.line(
            f"batch size {session.batch_size} instead of {config.run.batch_size}: the training set has no more images"
        )
    for before, epochs in zip(accumulate(config.run.cycles), config.run.extend, strict=False):
        log.line(
            f"extended by {counted(epochs, 'epoch')}: the {config.optim.schedule} schedule begins again at epoch "
            f"{before + 1}, with a peak learning rate of {config.optim.lr:g}"
        )
    if resuming:
        log.line(f"resuming {session.folder.root} after epoch {session.state.epoch}, step {session.state.step}")


def record_epoch(session: TrainSession, evaluation: Evaluation, eval_seconds: float) -> dict[str, Any]:
    """Queue the epoch's metrics and the losses of its steps for writing, log a line, and return the metrics."""
    state, loader, config = session.state, session.train_loader, session.config
    seconds = state.epoch_seconds
    images = loader.steps_per_epoch * session.batch_size
    metrics = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "train_loss": sum(state.epoch_losses) / len(state.epoch_losses),
        "train_accuracy": state.epoch_correct / images,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "balanced_test_accuracy": evaluation.balanced_accuracy,
        "learning_rate": peak_lr(session.scheduler.optimizer),
        "images_per_second": images / seconds,
        "seconds": seconds,
        "eval_seconds": eval_seconds,
        "peak_memory_mib": memory.peak_mib(session.accelerator.device),
        "skipped_steps": state.skipped_steps,
        **_gpu_usage(state.epoch_usage),
    }
    if session.accelerator.is_main_process:
        session.metrics_buffer.add(session.folder.metrics, [metrics])
        first = state.step - len(state.epoch_losses) + 1
        losses = enumerate(state.epoch_losses, start=first)
        session.metrics_buffer.add(session.folder.steps, [{"step": step, "loss": loss} for step, loss in losses])
    session.log.line(
        f"epoch {metrics['epoch']:>3}/{config.run.total_epochs}  train loss {metrics['train_loss']:.4f}  "
        f"{session.dataset.evaluated_on} loss {evaluation.loss:.4f}  "
        f"{session.dataset.name} accuracy {evaluation.accuracy:.2%}  "
        + (f"balanced {evaluation.balanced_accuracy:.2%}  " if config.run.keep_best_of == "balanced" else "")
        + f"{metrics['images_per_second']:,.0f} img/s  {seconds + eval_seconds:.1f} s{_gpu_words(metrics)}"
        + (f"  {counted(state.skipped_steps, 'step')} skipped by fp16's scaler so far" if state.skipped_steps else "")
    )
    slowdown = session.slowdown.factor(seconds, loader.steps_per_epoch)
    if slowdown is not None:
        session.log.line(
            f"warning: steps take {slowdown:.1f} times as long as in the fastest epoch: "
            "other processes seem to be using this machine"
        )
    known = {k: v for k, v in metrics.items() if k not in ("epoch", "step") and v is not None}
    session.accelerator.log(known, step=state.step)
    return metrics


def log_target_reached(session: TrainSession) -> None:
    """Log that the target accuracy was reached, and after how many seconds."""
    state, compile_seconds = session.state, session.compile_seconds
    session.log.line(
        f"{session.config.run.target_accuracy:.2%} reached after {counted(state.epochs_to_target or 0, 'epoch')} and "
        f"{state.seconds_to_target:.1f} s of training and evaluating"
        + (
            f", not counting {compile_seconds:.1f} s of compilation and first passes"
            if compile_seconds is not None
            else ""
        )
    )


def _gpu_usage(usage: Usage) -> dict[str, float | None]:
    """Return energy, power and utilisation of the GPUs as metrics.jsonl has them; None if not measured."""
    return {
        "energy_joules": usage.energy_joules,
        "mean_power_watts": usage.mean_power_watts,
        "gpu_utilization": usage.utilization,
    }


def _gpu_words(metrics: dict[str, Any]) -> str:
    """Return the end of an epoch's log line: energy, power, utilisation and memory, if they were measured."""
    words = {
        "energy_joules": lambda joules: f"{joules:,.0f} J",
        "mean_power_watts": lambda watts: f"{watts:,.0f} W",
        "gpu_utilization": lambda share: f"GPU {share:.0%}",
    }
    shown = [word(metrics[key]) for key, word in words.items() if metrics[key] is not None]
    return "".join(f"  {word}" for word in [*shown, f"{metrics['peak_memory_mib']:,.0f} MiB"] if shown)


def write_weights(session: TrainSession, name: str, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as safetensors, and timm's config.json, into the run's folder; call it on all ranks.

    Args:
        session: the run; each rank may hold a shard of its weights.
        name: the name of the file.
        metadata: one entry to write into the file: safetensors writes several in an order that changes.

    Raises:
        SaveError: on all ranks, if they could not be written.
    """
    state_dict = session.accelerator.get_state_dict(session.eval_model)

    def write() -> None:
        weights = {key: value.contiguous().cpu() for key, value in state_dict.items()}
        partial = session.folder.root / f".{name}.partial"
        with atomic_io.as_save_error(f"{session.folder.root / name} could not be written"):
            try:
                save_file(weights, partial, metadata or {"format": "pt"})
                atomic_io.publish(partial, session.folder.root / name)
            finally:
                partial.unlink(missing_ok=True)
            _write_model_config(session)

    sync.broadcast_from_rank0(session.accelerator, write)


def _write_model_config(session: TrainSession) -> None:
    """Write the config.json that timm needs next to the weights."""
    classes = session.dataset.classes
    names = {"label_names": list(classes)} if len(classes) == session.bare_model.num_classes else {}
    preprocessing = {"input_size": tuple(session.config.input_size), **Rendering.of(session.config.data).timm_entries()}
    write_timm_config(session.bare_model, session.folder.root / "config.json", names, preprocessing)


def finish(session: TrainSession, evaluation: Evaluation, weights: str, trained: bool) -> dict[str, Any]:
    """Write weights, summary and curves, and print the table of results; returns the summary.

    Args:
        session: the run.
        evaluation: that of the weights.
        weights: what they are, as `final_weights.bring_back` says.
        trained: whether this process has trained; otherwise the run's summary keeps what it says of the training.

    Raises:
        SaveError: on all ranks, if they could not be written; the last checkpoint is not affected.
    """
    summary = {**_summary(session, evaluation), "final_weights": weights}
    if not trained:
        summary |= _measured_before(session)
    write_weights(session, FINAL)

    def write() -> None:
        with atomic_io.as_save_error(f"the summary of {session.folder.root} could not be written"):
            _write_summary(session, summary)

    sync.broadcast_from_rank0(session.accelerator, write)
    return summary


def _write_summary(session: TrainSession, summary: dict[str, Any]) -> None:
    session.metrics_buffer.flush()
    atomic_io.write_atomically(session.folder.summary, json.dumps(summary, indent=2) + "\n")
    plot_curves([session.folder.root], session.folder.root / "curves.png", session.dataset.name)
    session.log.console.print(table(read_runs([session.folder.root])))
    for warning in findings.warnings(summary, read_jsonl(session.folder.metrics)):
        session.log.line(f"warning: {warning}")
    session.log.line(f"written to {session.folder.root}; next: {_next_step(session)}")


def _measured_before(session: TrainSession) -> dict[str, Any]:
    """Return what the run's summary says of its training, which was all done before this process."""
    try:
        before = read_json(session.folder.summary)
    except (OSError, ValueError):
        return {}
    if not isinstance(before, dict) or before.get("steps") != session.state.step:  # such as after --stop-after
        return {}
    return {key: before[key] for key in OF_THE_TRAINING if key in before}


def _next_step(session: TrainSession) -> str:
    """Return what to do next: train the remaining epochs, or look at the results."""
    epochs = session.config.run.total_epochs
    if session.state.epoch < epochs and not is_out_of_patience(session):
        return f"repeat the command with --resume auto and without --stop-after to train up to epoch {epochs}"
    return f"fastvit report {shlex.quote(str(session.folder.root))}"


OF_THE_TRAINING = (
    *("eval_seconds", "epochs_to_target", "seconds_to_target"),
    *("compile_seconds", "cores_used_by_others", "peak_memory_mib"),
    *("mixed_precision", "world_size", "device", "versions"),
)
"""what a process that trains nothing would measure differently"""


def _summary(session: TrainSession, evaluation: Evaluation) -> dict[str, Any]:
    state, config, accelerator = session.state, session.config, session.accelerator
    model = session.bare_model
    parameters = sum(p.numel() for p in model.parameters())
    images, usage = state.step * session.batch_size, state.usage
    return {
        "model": config.model.model,
        "dataset": session.dataset.name,
        "evaluated_on": session.dataset.evaluated_on,
        "evaluated_images": evaluation.samples,
        "recipe": config.run.recipe,
        "seed": config.run.seed,
        "parameters": parameters,
        "num_classes": model.num_classes,
        "model_size_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "epochs": state.epoch,
        "steps": state.step,
        "batch_size": session.batch_size,
        "test_accuracy": evaluation.accuracy,
        "best_test_accuracy": state.best_accuracy,
        "balanced_test_accuracy": evaluation.balanced_accuracy,
        "majority_share": evaluation.majority_share,
        "test_loss": evaluation.loss,
        "skipped_steps": state.skipped_steps,
        "train_seconds": state.train_seconds,
        "eval_seconds": state.eval_seconds,
        "target_accuracy": config.run.target_accuracy,
        "epochs_to_target": state.epochs_to_target,
        "seconds_to_target": state.seconds_to_target,
        "compile_seconds": session.compile_seconds,
        "images_per_second": images / state.train_seconds if state.train_seconds else None,
        "cores_used_by_others": session.other_processes.cores() if accelerator.num_processes == 1 else None,
        "peak_memory_mib": memory.peak_mib(accelerator.device),
        **_gpu_usage(usage),
        "energy_joules_per_image": None if usage.energy_joules is None else usage.energy_joules / images,
        "energy_unmeasured": usage.energy_unmeasured,
        "attention": config.model.attention,
        "mixed_precision": accelerator.mixed_precision,
        "world_size": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "timm": timm.__version__,
        },
    }

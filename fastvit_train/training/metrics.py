"""What a run writes along the way and at its end: metrics, summary, weights for timm, curves."""

import json
import platform
from typing import Any

import accelerate
import timm
import torch
from safetensors.torch import save_file

from fastvit_train.config.overrides import flatten
from fastvit_train.distributed import sync
from fastvit_train.distributed.accelerator import device_name
from fastvit_train.models.evaluator import Evaluation
from fastvit_train.runs.comparison import table
from fastvit_train.runs.plots import plot_curves
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import atomic_io, memory
from fastvit_train.utils.timm_config import write_timm_config

TRACKER_PROJECT = "fastvit_train"


def start_trackers(job: TrainSession) -> None:
    """Open the trackers asked for, with the configuration; TensorBoard takes no None and no lists."""
    if job.config.run.track:
        scalars = {k: v for k, v in flatten(job.config.settings).items() if isinstance(v, bool | int | float | str)}
        job.accelerator.init_trackers(TRACKER_PROJECT, config=scalars)


def finish_trackers(job: TrainSession) -> None:
    """Close the trackers; the processes stay joined, for another run."""
    for tracker in job.accelerator.trackers:
        tracker.finish()


def record_epoch(job: TrainSession, evaluation: Evaluation, eval_seconds: float) -> None:
    """Write the epoch's line of metrics, its steps' losses, and say how it went."""
    progress, loader, config = job.progress, job.train_loader, job.config
    seconds = progress.epoch_seconds
    images = loader.steps_per_epoch * job.batch_size
    metrics = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": sum(progress.epoch_losses) / len(progress.epoch_losses),
        "train_accuracy": progress.epoch_correct / images,
        "test_loss": evaluation.loss,
        "test_accuracy": evaluation.accuracy,
        "learning_rate": job.scheduler.optimizer.param_groups[0]["lr"],
        "images_per_second": images / seconds,
        "seconds": seconds,
        "eval_seconds": eval_seconds,
        "peak_memory_mib": memory.peak_mib(job.accelerator.device),
        "skipped_steps": progress.skipped_steps,
        **_gpu_usage(seconds, progress.epoch_joules, progress.epoch_busy_seconds),
    }
    if job.accelerator.is_main_process:
        job.journal.add(job.folder.metrics, [metrics])
        first = progress.step - len(progress.epoch_losses) + 1
        losses = enumerate(progress.epoch_losses, start=first)
        job.journal.add(job.folder.steps, [{"step": step, "loss": loss} for step, loss in losses])
    job.log.line(
        f"epoch {metrics['epoch']:>3}/{config.run.epochs}  train loss {metrics['train_loss']:.4f}  "
        f"{job.dataset.evaluated_on} loss {evaluation.loss:.4f}  "
        f"{job.dataset.name} accuracy {evaluation.accuracy:.2%}  "
        f"{metrics['images_per_second']:,.0f} img/s  {seconds + eval_seconds:.1f} s{_gpu_words(metrics)}"
        + (f"  {progress.skipped_steps} steps skipped by fp16's scaler so far" if progress.skipped_steps else "")
    )
    known = {k: v for k, v in metrics.items() if k not in ("epoch", "step") and v is not None}
    job.accelerator.log(known, step=progress.step)


def tell_target(job: TrainSession) -> None:
    """Say that the target accuracy was reached, and on which clock."""
    progress, apart = job.progress, job.compile_seconds
    job.log.line(
        f"{job.config.run.target_accuracy:.2%} reached after {progress.epochs_to_target} epochs and "
        f"{progress.seconds_to_target:.1f} s of training and evaluating"
        + (f"; first passes and compiling, {apart:.1f} s, apart" if apart is not None else "")
    )


def _gpu_usage(seconds: float, joules: float | None, busy_seconds: float | None) -> dict[str, float | None]:
    """What the GPUs took and did, as metrics.jsonl and summary.json hold it; null where not measured."""
    spent = seconds > 0
    return {
        "energy_joules": joules if spent else None,
        "mean_power_watts": joules / seconds if spent and joules is not None else None,
        "gpu_utilization": busy_seconds / seconds if spent and busy_seconds is not None else None,
    }


def _gpu_words(metrics: dict[str, Any]) -> str:
    """The end of an epoch's line: what the GPUs took and did, as far as it was measured."""
    words = {
        "energy_joules": lambda joules: f"{joules:,.0f} J",
        "mean_power_watts": lambda watts: f"{watts:,.0f} W",
        "gpu_utilization": lambda share: f"GPU {share:.0%}",
    }
    said = [word(metrics[key]) for key, word in words.items() if metrics[key] is not None]
    return "".join(f"  {word}" for word in [*said, f"{metrics['peak_memory_mib']:,.0f} MiB"] if said)


def write_weights(job: TrainSession, name: str) -> None:
    """The weights as safetensors in the run's folder; to be called on every process, as each may hold a part.

    Raises:
        SaveError: on all processes, where the disk doesn't take them.
    """
    whole = job.accelerator.get_state_dict(job.eval_model)

    def write() -> None:
        weights = {key: value.contiguous().cpu() for key, value in whole.items()}
        partial = job.folder.root / f".{name}.partial"
        with atomic_io.as_save_error(f"{job.folder.root / name} could not be written"):
            try:
                save_file(weights, partial, {"format": "pt"})
                atomic_io.publish(partial, job.folder.root / name)
            finally:
                partial.unlink(missing_ok=True)

    sync.broadcast_from_rank0(job.accelerator, write)


def finish(job: TrainSession, evaluation: Evaluation) -> dict[str, Any]:
    """Write weights, summary and curves, and print the closing table; returns the summary.

    Raises:
        SaveError: on all processes, where the disk doesn't take them; the checkpoint before is whole.
    """
    summary = _summary(job, evaluation)
    write_weights(job, "model.safetensors")

    def write() -> None:
        with atomic_io.as_save_error(f"the summary of {job.folder.root} could not be written"):
            _write_summary(job, summary)

    sync.broadcast_from_rank0(job.accelerator, write)
    return summary


def _write_summary(job: TrainSession, summary: dict[str, Any]) -> None:
    job.journal.flush()
    names = {"label_names": list(job.dataset.classes)} if len(job.dataset.classes) == summary["num_classes"] else {}
    input_size = {"input_size": (3, job.config.image_size, job.config.image_size)}
    write_timm_config(job.bare_model, job.folder.root / "config.json", names, input_size)
    atomic_io.write_atomically(job.folder.summary, json.dumps(summary, indent=2) + "\n")
    plot_curves([job.folder.root], job.folder.root / "curves.png", job.dataset.name)
    job.log.console.print(table([job.folder.root]))
    job.log.line(f"written to {job.folder.root}")


def _summary(job: TrainSession, evaluation: Evaluation) -> dict[str, Any]:
    progress, config, accelerator = job.progress, job.config, job.accelerator
    model = job.bare_model
    parameters = sum(p.numel() for p in model.parameters())
    images = progress.step * job.batch_size
    return {
        "model": config.model.model,
        "dataset": job.dataset.name,
        "evaluated_on": job.dataset.evaluated_on,
        "evaluated_images": evaluation.samples,
        "recipe": config.run.recipe,
        "seed": config.run.seed,
        "parameters": parameters,
        "num_classes": model.num_classes,
        "model_size_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "epochs": progress.epoch,
        "steps": progress.step,
        "batch_size": job.batch_size,
        "test_accuracy": evaluation.accuracy,
        "best_test_accuracy": progress.best_accuracy,
        "test_loss": evaluation.loss,
        "skipped_steps": progress.skipped_steps,
        "train_seconds": progress.train_seconds,
        "eval_seconds": progress.eval_seconds,
        "target_accuracy": config.run.target_accuracy,
        "epochs_to_target": progress.epochs_to_target,
        "seconds_to_target": progress.seconds_to_target,
        "compile_seconds": job.compile_seconds,
        "images_per_second": images / progress.train_seconds if progress.train_seconds else None,
        "peak_memory_mib": memory.peak_mib(accelerator.device),
        **_gpu_usage(progress.train_seconds, progress.energy_joules, progress.busy_seconds),
        "energy_unmeasured": progress.energy_unmeasured,
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

"""What would make training steps faster, tried out: each candidate against the step as it is, in turn."""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastvit_train.models.attention as attention
from fastvit_train import optim
from fastvit_train.models import compile_blocks, set_attention
from fastvit_train.roofline import synchronize
from fastvit_train.setup import Job

WARM_UP, ROUNDS = 3, 9
STEPS = {"cpu": 1}
GPU_STEPS = 20
"""between two synchronisations"""


@dataclass(frozen=True)
class Candidate:
    """A change to the run, and what it was measured to bring."""

    what: str
    how: str
    """how a user makes it"""
    gain: float
    """images/s over those of the step as it is"""


@dataclass(frozen=True)
class Variant:
    """How a step is computed; what is None is as in the run."""

    precision: str | None = None
    compiled: bool | None = None
    attention: str | None = None
    batch_factor: int = 1


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """The dtype behind accelerate's name of it; None for "no"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def measure_candidates(job: Job) -> list[Candidate]:
    """All that can be tried with this run on this device, by gain."""
    tried = {(what, how): (step_of(job, variant), variant.batch_factor) for what, how, variant in _variants(job)}
    baseline = step_of(job, Variant())
    runs = [baseline, *(run for run, _ in tried.values())]
    base, *others = in_turn(runs, STEPS.get(job.accelerator.device.type, GPU_STEPS), job.accelerator.device)
    found = [
        Candidate(what, how, gain=factor * base / seconds)
        for ((what, how), (_, factor)), seconds in zip(tried.items(), others, strict=True)
    ]
    return sorted(found, key=lambda candidate: -candidate.gain)


def _variants(job: Job) -> list[tuple[str, str, Variant]]:
    """What to change, how a user does, and as a step."""
    config = job.config
    found = []
    if job.accelerator.mixed_precision == "no":
        found.append(("bf16", "accelerate launch --mixed_precision bf16", Variant(precision="bf16")))
    if not config.run.compile:
        found.append(("--compile", "torch.compile of the blocks", Variant(compiled=True)))
    for name in attention.alternatives(job.bare_model, config.model.attention):
        found.append((f"--attention {name}", "the same weights, computed otherwise", Variant(attention=name)))
    double = 2 * config.run.batch_size
    if double <= len(job.dataset.train.labels):
        how = "another training: the learning rate wants tuning"
        found.append((f"--batch-size {double}", how, Variant(batch_factor=2)))
    return found


def step_of(job: Job, variant: Variant) -> Callable[[], None]:
    """A training step of a copy of the run's model on a batch of its data, warmed up."""
    config, device = job.config, job.accelerator.device
    model = copy.deepcopy(job.bare_model).train()
    if variant.attention is not None:
        set_attention(model, variant.attention)
    if config.run.compile if variant.compiled is None else variant.compiled:
        compile_blocks(model)
    optimizer = optim.build_optimizer(model, config.optim)
    images, labels = next(job.train_loader.micro_batches(0))
    images, labels = (tensor.repeat_interleave(variant.batch_factor, 0) for tensor in (images, labels))
    dtype = autocast_dtype(variant.precision or job.accelerator.mixed_precision)

    def step() -> None:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.optim.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    synchronize(device)
    return step


def in_turn(runs: list[Callable[[], None]], calls: int, device: torch.device) -> list[float]:
    """The median seconds of `calls` calls of each, all of them in every round."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, values in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            values.append(time.perf_counter() - started)
    return [statistics.median(values) for values in seconds]

"""What would make training steps faster, tried out: each candidate against the step as it is, in turn."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastvit_train.models.attention as attention
from fastvit_train.models import compile_model, set_attention
from fastvit_train.training.optimizer import build_optimizer
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import supports_cuda_graphs
from fastvit_train.utils.timing import quartiles, synchronize, time_in_rounds

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
    sure: bool = True
    """the quartiles of its times and of the present ones are apart"""
    same_training: bool = True
    """the change leaves what is learned as it is, but for rounding"""
    failed: str | None = None
    """why it could not be tried"""

    def __str__(self) -> str:
        return f"{self.what} {self.gain:.2f}x" if self.failed is None else f"{self.what} failed ({self.failed})"


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


def measure_candidates(session: TrainSession) -> list[Candidate]:
    """All that can be tried with this run on this device, by gain; what fails is among them, with a gain of 0."""
    device = session.accelerator.device
    variants = _variants(session)
    steps, failed = {Variant(): step_of(session, Variant())}, []
    with torch._dynamo.config.patch(recompile_limit=64):  # beyond it candidates would silently not be compiled
        for what, how, variant in variants:
            try:
                steps[variant] = step_of(session, variant)
            except Exception as error:  # out of memory, no compiler, a shape that an attention refuses: all say why
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                failed.append(Candidate(what, how, gain=0.0, sure=False, failed=reason))
        calls = STEPS.get(device.type, GPU_STEPS)
        rounds = time_in_rounds(list(steps.values()), ROUNDS, device, calls)
        times = {variant: quartiles(seconds) for variant, seconds in zip(steps, rounds, strict=True)}
    present = times.pop(Variant())
    found = [
        Candidate(
            what,
            how,
            gain=variant.batch_factor * present.median / times[variant].median,
            sure=variant.batch_factor * present.low > times[variant].high,
            same_training=variant.batch_factor == 1,
        )
        for what, how, variant in variants
        if variant in times
    ]
    return sorted(found, key=lambda candidate: -candidate.gain) + failed


def _variants(session: TrainSession) -> list[tuple[str, str, Variant]]:
    """What to change, how a user does, and as a step."""
    config = session.config
    found = []
    if session.accelerator.mixed_precision == "no":
        found.append(("bf16", "accelerate launch --mixed_precision bf16", Variant(precision="bf16")))
    if not config.run.compile:
        found.append(("--compile", "torch.compile of the model", Variant(compiled=True)))
    for name in attention.alternatives(session.bare_model, config.model.attention):
        found.append((f"--attention {name}", "the same weights, computed otherwise", Variant(attention=name)))
    double = 2 * config.run.batch_size
    if double <= len(session.dataset.train.labels):
        how = "another training: the learning rate wants tuning"
        found.append((f"--batch-size {double}", how, Variant(batch_factor=2)))
    return found


def step_of(session: TrainSession, variant: Variant) -> Callable[[], None]:
    """A training step of a copy of the run's model on a batch of its data, warmed up."""
    config, device = session.config, session.accelerator.device
    model = copy.deepcopy(session.bare_model).train()
    if variant.attention is not None:
        set_attention(model, variant.attention)
    if config.run.compile if variant.compiled is None else variant.compiled:
        compile_model(model, graphed=supports_cuda_graphs(config, session.accelerator))
    optimizer = build_optimizer(model, config.optim)
    images, labels = next(session.train_loader.micro_batches(0))
    images, labels = (tensor.repeat_interleave(variant.batch_factor, 0) for tensor in (images, labels))
    dtype = autocast_dtype(variant.precision or session.accelerator.mixed_precision)

    def step() -> None:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.optim.label_smoothing)
        loss.backward()
        if config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    synchronize(device)
    return step

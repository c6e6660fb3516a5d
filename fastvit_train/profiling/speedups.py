"""What would make training steps faster: each candidate change is measured against the present step."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import fastvit_train.models.attention as attention
from fastvit_train.models import compile_model, record_graph, set_attention, set_block
from fastvit_train.models.compiling import check_compiler
from fastvit_train.training.graphed_step import why_not_recordable
from fastvit_train.training.optim.optimizer import build_optimizer, device_lr, with_device_lr
from fastvit_train.training.prepare import supports_cuda_graphs
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.timing import quartiles, synchronize, time_in_rounds
from fastvit_train.utils.torch_private import recompile_limit

WARM_UP_STEPS, ROUNDS = 3, 9
STEPS = {"cpu": 1}
GPU_STEPS = 20
"""steps between two synchronisations, as one step of a small model takes little longer than a synchronisation"""
RECOMPILE_LIMIT = 64
"""enough for all candidates: they compile the same functions for other shapes and dtypes"""


@dataclass(frozen=True)
class Candidate:
    """A change to the run, and its measured gain."""

    what: str
    how: str
    """how a user makes the change"""
    gain: float
    """images/s relative to the present step"""
    sure: bool = True
    """whether the interquartile ranges of its times and of the present step's times do not overlap"""
    same_training: bool = True
    """whether the change affects the training by rounding only"""
    failed: str | None = None
    """why it could not be measured"""

    @property
    def measured(self) -> str:
        """The change and its gain, as every line about it has them."""
        return f"{self.what} {self.gain:.2f}x"

    def __str__(self) -> str:
        if self.failed is not None:
            return f"{self.what} failed ({self.failed})"
        remarks = [*([] if self.sure else ["uncertain"]), *([] if self.same_training else ["a different training"])]
        return f"{self.measured} ({', '.join(remarks)})" if remarks else self.measured


@dataclass(frozen=True)
class Variant:
    """How a step is computed; None stands for the run's own setting."""

    precision: str | None = None
    compiled: bool | None = None
    attention: str | None = None
    batch_factor: int = 1


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """Return the dtype that accelerate's `mixed_precision` stands for; None for "no"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def measure_candidates(session: TrainSession) -> list[Candidate]:
    """Measure each change that this run and device allow.

    Returns:
        The changes in decreasing order of gain, followed by those that failed, whose gain is 0.
    """
    device = session.accelerator.device
    variants = list_variants(session)
    steps, failed = {Variant(): build_step(session, Variant())}, []
    with recompile_limit(RECOMPILE_LIMIT):
        for what, how, variant in variants:
            try:
                steps[variant] = build_step(session, variant)
            except Exception as error:  # such as too little memory, a missing compiler, or an unsupported shape
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                failed.append(Candidate(what, how, gain=0.0, sure=False, failed=reason))
        calls = STEPS.get(device.type, GPU_STEPS)
        rounds = time_in_rounds(list(steps.values()), ROUNDS, device, calls)
        times = {variant: quartiles(seconds) for variant, seconds in zip(steps, rounds, strict=True)}
    present = times.pop(Variant())
    measured = [
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
    return sorted(measured, key=lambda candidate: -candidate.gain) + failed


def list_variants(session: TrainSession) -> list[tuple[str, str, Variant]]:
    """List the changes to try: what changes, how a user makes the change, and how its step is computed."""
    config = session.config
    variants = []
    if session.accelerator.mixed_precision == "no":
        variants.append(("bf16", "accelerate launch --mixed_precision bf16", Variant(precision="bf16")))
    if not config.run.compile:
        variants.append(("--compile", "torch.compile of the model", Variant(compiled=True)))
    for name in attention.alternatives(session.bare_model, config.model.attention):
        variants.append(
            (
                f"--attention {name}",
                "another implementation of the same computation",
                Variant(attention=name),
            )
        )
    double = 2 * config.run.batch_size
    if double <= len(session.dataset.train.labels):
        how = "tune the learning rate again"
        variants.append((f"--batch-size {double}", how, Variant(batch_factor=2)))
    return variants


def build_step(session: TrainSession, variant: Variant) -> Callable[[], None]:
    """Build and warm up a training step of a copy of the run's model, on a fixed batch of the run's data."""
    config, device = session.config, session.accelerator.device
    model = copy.deepcopy(session.bare_model).train()
    if variant.attention is not None:
        set_block(model, "torch")
        set_attention(model, variant.attention)
    optimizer = build_optimizer(model, config.optim)
    compiled = config.run.compile if variant.compiled is None else variant.compiled
    recorded = compiled and not why_not_recordable(config, session.accelerator, model, optimizer, session.train_loader)
    if compiled:
        check_compiler(device)
        compile_model(model, device, not recorded and supports_cuda_graphs(config, session.accelerator))
    learning_rates = device_lr(optimizer, device)
    images, labels = next(session.train_loader.micro_batches(0))
    images, labels = (tensor.repeat_interleave(variant.batch_factor, 0) for tensor in (images, labels))
    dtype = autocast_dtype(variant.precision or session.accelerator.mixed_precision)

    def step() -> None:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = model(images)
        loss = session.loss(logits.float(), labels)
        loss.backward()
        if config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        with with_device_lr(optimizer, learning_rates) if recorded else nullcontext():
            optimizer.step()
        optimizer.zero_grad()

    if recorded:
        step = record_graph(step).replay
    for _ in range(WARM_UP_STEPS):
        step()
    synchronize(device)
    return step

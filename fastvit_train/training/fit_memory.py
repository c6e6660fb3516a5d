"""--fit-memory: batches split into as few micro-batches as fit in memory; the number is found by trying."""

import copy
from collections.abc import Callable, Sequence
from math import gcd

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.distributed import env, sync
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.training.prepare import Inputs
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError, counted

USABLE = 0.9
"""fraction of the memory that the trials may take: a step may need a little more than they measure"""
Trial = Callable[[int], object]
"""a function that takes a number of images, and computes with that many at a time"""


def check_fit_memory() -> None:
    """Raise UserError if this launch shards the weights: trials on whole weights would say nothing about it."""
    if env.uses_fsdp():
        raise UserError(
            "--fit-memory tries the model with all of its weights, and FSDP shards them; give --grad-accum instead"
        )


def fit_in_memory(
    config: ResolvedConfig, model: nn.Module, inputs: Inputs, accelerator: Accelerator
) -> tuple[ResolvedConfig, Inputs, list[str]]:
    """Split batches, also those of evaluations, so that they fit in the memory of every rank.

    Weights and random states do not change.

    Args:
        config: the run's configuration; there will be at least its `grad_accum` micro-batches.
        model: with the attention and the blocks that the run will use.
        inputs: of the run, for the batches that `config` asks for.
        accelerator: the ranks; each tries on its own device.

    Returns:
        Configuration and inputs with the batches that fit, and what was found, in words.

    Raises:
        UserError: if a single image does not fit.
    """
    device = accelerator.device
    limit_mib = USABLE * memory.capacity_mib(device, env.local_world_size())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        train = largest_on_all_ranks(
            accelerator, micro_batch_sizes(config, inputs, accelerator.num_processes),
            limit_mib - beside_mib(config, model, accelerator),
            lambda: training_trial(config, model, inputs, accelerator),
        )  # fmt: skip
        evaluation = largest_on_all_ranks(
            accelerator, halvings(inputs.eval_loader.batch_size), limit_mib,
            lambda: evaluation_trial(model, inputs, accelerator),
        )  # fmt: skip
    grad_accum = inputs.batch_size // accelerator.num_processes // train
    batches = f"{counted(grad_accum, 'micro-batch')} of {counted(train, 'image')}"
    message = f"memory: {inputs.batch_size} images per step are {batches} per process; evaluated {evaluation} at a time"
    return config.with_batches(grad_accum, evaluation), inputs.with_batches(grad_accum, evaluation, train), [message]


def beside_mib(config: ResolvedConfig, model: nn.Module, accelerator: Accelerator) -> float:
    """Return the memory of what a run has in addition to a trial: averages of the weights, and DDP's buckets."""
    others = [config.optim.ema is not None, config.run.average_last is not None, accelerator.num_processes > 1]
    return sum(others) * sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20


def micro_batch_sizes(config: ResolvedConfig, inputs: Inputs, ranks: int) -> list[int]:
    """Return how many images a micro-batch of one rank may have, ascending.

    Each divides the batch that is asked for too, which can be larger than the training set allows: a resumed run checks
    it.
    """
    divisible = gcd(config.run.batch_size, inputs.batch_size) // ranks
    numbers = [n for n in range(config.optim.grad_accum, divisible + 1) if divisible % n == 0]
    return [inputs.batch_size // ranks // n for n in reversed(numbers)]


def halvings(size: int) -> list[int]:
    """Return `size`, its half, and so on to 1, ascending."""
    return sorted({max(1, size >> shift) for shift in range(size.bit_length())})


def largest_on_all_ranks(
    accelerator: Accelerator, sizes: Sequence[int], limit_mib: float, build: Callable[[], Trial]
) -> int:
    """Return the largest of `sizes` whose trial stays within the memory limit on all ranks.

    Raises:
        UserError: if the smallest does not on one of them.
    """

    def find() -> int:
        size = largest_that_fits(sizes, limit_mib, lambda: peaks_of(build(), accelerator.device))
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if size is None:
            raise UserError(
                f"{counted(sizes[0], 'image')} at a time take more than the {limit_mib:,.0f} MiB of memory that this "
                "process may use; choose a smaller --model or --image-size, or --grad-checkpointing"
            )
        return size

    own = sync.run_on_all_ranks(accelerator, find)
    return min(gather_object([own]))


def largest_that_fits(
    sizes: Sequence[int], limit_mib: float, start: Callable[[], Callable[[int], float]]
) -> int | None:
    """Return the largest of `sizes` whose trial stays within `limit_mib`, or None.

    A size is tried only if the two before it do not predict that it is too large: on a CPU, a process that takes too
    much memory is killed.

    Args:
        sizes: ascending.
        limit_mib: memory that a trial may take.
        start: builds what the trials need, and returns what tries a size and returns its peak in MiB.
    """
    measured: list[tuple[int, float]] = []
    try:
        peak_mib = start()
        for size in sizes:
            if _predict(measured, size) > limit_mib or (peak := peak_mib(size)) > limit_mib:
                break
            measured.append((size, peak))
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    return measured[-1][0] if measured else None


def _predict(measured: Sequence[tuple[int, float]], size: int) -> float:
    """Continue the line through the last two measurements to `size`; 0 if there are fewer."""
    if len(measured) < 2:
        return 0.0
    (size_0, peak_0), (size_1, peak_1) = measured[-2:]
    return peak_1 + max(0.0, peak_1 - peak_0) / (size_1 - size_0) * (size - size_1)


def peaks_of(trial: Trial, device: torch.device) -> Callable[[int], float]:
    """Return a function that runs `trial` and returns the peak of memory meanwhile, in MiB."""

    def peak(size: int) -> float:
        memory.reset_peak_memory(device)
        trial(size)
        return memory.peak_mib(device)

    return peak


def training_trial(config: ResolvedConfig, model: nn.Module, inputs: Inputs, accelerator: Accelerator) -> Trial:
    """Return a function that takes a training step of a copy of `model`."""
    trained = copy.deepcopy(model).to(accelerator.device).train()
    optimizer = build_optimizer(trained, config.optim)
    loader = inputs.train_loader
    loader.start_epoch(0)

    def take_step(size: int) -> None:
        images, labels = next(loader.batches([torch.arange(size)]))
        with accelerator.autocast():
            loss = inputs.loss(trained(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the next micro-batch finds gradients to add to

    return take_step


def evaluation_trial(model: nn.Module, inputs: Inputs, accelerator: Accelerator) -> Trial:
    """Return a function that evaluates a batch with a copy of `model`."""
    evaluated = copy.deepcopy(model).to(accelerator.device).eval()

    @torch.no_grad()
    def evaluate(size: int) -> None:
        images, _, _ = next(iter(inputs.eval_loader.with_batch_size(size)))
        with accelerator.autocast():
            evaluated(images)

    return evaluate

"""The stages of a run's setup that build what the optimizer changes: compiled, wrapped for the launch, warmed up."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.data.datasets import DatasetSpec
from fastvit_train.data.loader import EvalLoader, TrainLoader
from fastvit_train.distributed import env, parallelize
from fastvit_train.models.attention import AUTO, COMPILING, choose_attention, set_attention, warm_up
from fastvit_train.models.blocks import choose_block
from fastvit_train.models.build import build_model
from fastvit_train.models.compiling import compile_function, compile_model
from fastvit_train.training.graphed_step import why_not_recordable
from fastvit_train.training.optim.final_weights import build_average
from fastvit_train.training.optim.layers import freeze_first
from fastvit_train.training.optim.loss import Loss
from fastvit_train.training.optim.muon import Muon
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.training.optim.schedule import Schedule
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import time_call


@dataclass(frozen=True)
class Inputs:
    """The data set, its loaders, the loss, and the batch size that fits."""

    dataset: DatasetSpec
    train_loader: TrainLoader
    eval_loader: EvalLoader
    loss: Loss
    batch_size: int
    micro_batch: int
    """images per forward pass of one rank"""

    def with_seed(self, seed: int) -> Self:
        """Return the inputs of another run, which share the images."""
        return replace(self, train_loader=self.train_loader.with_seed(seed))

    def with_batches(self, grad_accum: int, eval_batch_size: int, micro_batch: int) -> Self:
        """Return the inputs with the same batches in other micro-batches, and with other batches of evaluations."""
        train_loader = self.train_loader.with_grad_accum(grad_accum)
        eval_loader = self.eval_loader.with_batch_size(eval_batch_size)
        return replace(self, train_loader=train_loader, eval_loader=eval_loader, micro_batch=micro_batch)


@dataclass(frozen=True)
class Trained:
    """What the optimizer changes, as Accelerate prepared it."""

    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: Schedule
    ema: ModelEmaV3 | None
    average: AveragedModel | None
    whole_step: bool
    """whether the step is to be recorded as one CUDA graph, so that nothing else has compiled it yet"""
    compile_seconds: float | None


def build_trainable(config: ResolvedConfig) -> tuple[nn.Module, Optimizer]:
    """Build the model, with the same weights on every rank, and its optimizer."""
    set_seed(config.run.seed)
    model = build_model(config.model, config.input_size, config.num_classes)
    if config.run.grad_checkpointing:
        checkpoint_blocks(model)
    if config.optim.freeze:
        freeze_first(model, config.optim.freeze)
    return model, build_optimizer(model, config.optim)


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each block of `model` compute its activations again in the backward pass (Chen et al. 2016).

    Raises:
        UserError: if the model does not support it.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # timm's models raise both
        raise UserError(
            f"{type(model).__name__} does not support --grad-checkpointing; omit it, or choose another --model"
        ) from None


def resolve_implementations(
    config: ResolvedConfig, model: nn.Module, inputs: Inputs, accelerator: Accelerator
) -> tuple[ResolvedConfig, list[str]]:
    """Replace "auto" by the block and the attention that suit this machine best.

    A deterministic run does not measure: the result may differ from machine to machine, and the implementations round
    differently.

    Returns:
        The configuration, and what was measured or went wrong, in words.
    """
    failures: list[str] = []
    if config.model.block == AUTO:
        block, failures = choose_block(config.model, model, accelerator, config.run.deterministic)
        config = config.with_model(block=block)
    if config.model.block == "cpp":
        set_attention(model, "cpp")
        config = config.with_model(attention="cpp")
    if config.model.attention != AUTO:
        return config, failures
    measure = not config.run.deterministic
    compiled = config.run.compile or env.compiles()
    name, messages = choose_attention(model, inputs.micro_batch, config.input_size, accelerator, measure, compiled)
    return config.with_model(attention=name), failures + messages


def prepare(
    config: ResolvedConfig, model: nn.Module, optimizer: Optimizer, inputs: Inputs, accelerator: Accelerator
) -> Trained:
    """Compile the model if asked for, build schedule and moving average, and let Accelerate prepare all of it."""
    whole_step = config.run.compile and not why_not_recordable(
        config, accelerator, model, optimizer, inputs.train_loader
    )
    if config.run.compile:
        compile_model(model, accelerator.device, not whole_step and supports_cuda_graphs(config, accelerator))
    scheduler = Schedule(optimizer, config.optim, config.run.cycles, inputs.train_loader.steps_per_epoch)
    ema, average = build_ema(model, config, accelerator), build_average(model, config)
    model, prepared_optimizer = parallelize.prepare(accelerator, model, optimizer, use_ddp=not whole_step)
    # after the model: the order determines their names in a checkpoint
    for follower in (ema and ema.module, average):
        if follower is not None:
            accelerator.prepare_model(follower, evaluation_mode=True)
    compile_seconds = take_first_passes(config, model, optimizer, ema, inputs, accelerator, whole_step)
    memory.reset_peak_memory(accelerator.device)
    return Trained(model, prepared_optimizer, scheduler, ema, average, whole_step, compile_seconds)


def take_first_passes(
    config: ResolvedConfig,
    model: nn.Module,
    optimizer: Optimizer,
    ema: ModelEmaV3 | None,
    inputs: Inputs,
    accelerator: Accelerator,
    whole_step: bool,
) -> float | None:
    """Compile now whatever the first step or evaluation would compile, but for a step that is recorded later.

    Returns:
        The seconds that this took; None if nothing is compiled.
    """
    device, compiled = accelerator.device, config.run.compile
    passes: list[float] = []
    if compiled or config.model.attention in COMPILING or config.model.block == "triton":
        eval_batch, size = inputs.eval_loader.batch_size, config.input_size
        passes.append(warm_up(model, 0 if whole_step else inputs.micro_batch, eval_batch, size, device))
        if ema is not None:
            passes.append(warm_up(ema.module, 0, eval_batch, size, device))
    if device.type == "cuda" and compiled and not whole_step and inputs.train_loader.is_resident:
        passes.append(compile_augmentation(inputs, device))
    if isinstance(optimizer, Muon) and not whole_step and not env.uses_fsdp():
        seconds = time_call(optimizer.compile_kernels, device)
        if device.type == "cuda":  # C++ kernels, of which every run has some, are not reported
            passes.append(seconds)
    return sum(passes) if passes else None


def compile_augmentation(inputs: Inputs, device: torch.device) -> float:
    """Compile the augmentation of a micro-batch of resident images, and return the seconds that this takes."""
    loader = inputs.train_loader
    loader.augmented = compile_function(loader.augmented, device)
    loader.start_epoch(0)
    samples = torch.zeros(inputs.micro_batch, dtype=torch.int64, device=device)
    return time_call(lambda: loader.batch(samples), device)


def supports_cuda_graphs(config: ResolvedConfig, accelerator: Accelerator) -> bool:
    """Whether --compile may launch the model as a CUDA graph: one GPU, one forward pass per optimizer step."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == config.optim.grad_accum == 1


def build_ema(model: nn.Module, config: ResolvedConfig, accelerator: Accelerator) -> ModelEmaV3 | None:
    """Build the moving average of the weights that `config` asks for; once prepared, checkpoints contain it.

    In the first steps it moves faster, so that it soon forgets the random weights.

    Raises:
        UserError: if the launch shards the weights.
    """
    if config.optim.ema is None:
        return None
    if env.uses_fsdp():
        raise UserError(
            "--ema needs unsharded weights, and FSDP shards them; leave it out, or use DDP: "
            "accelerate_configs/multi_gpu.yaml"
        )
    ema = ModelEmaV3(model, config.optim.ema, use_warmup=True)
    if config.run.compile:
        compile_model(ema.module, accelerator.device, supports_cuda_graphs(config, accelerator))
    return ema

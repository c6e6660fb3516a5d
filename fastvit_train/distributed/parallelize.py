"""DDP and FSDP2: their settings, and checks of what FSDP2 can train."""

import functools
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import accelerate.optimizer
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastvit_train.utils.errors import UserError

MAX_BUCKET_MIB = 25
"""gradients of up to this size are all-reduced in one bucket; larger ones in several, overlapping the backward pass"""

SHARDABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that update each element by itself, so that shards need no exchange; ours declare `shardable = True`."""


@functools.cache
def _find_packages_once() -> None:
    """Let Accelerate's optimizer, which looks for a package on the disk twice in every step, remember the answer."""
    if search := getattr(accelerate.optimizer, "is_lomo_available", None):  # not in every version
        accelerate.optimizer.is_lomo_available = functools.cache(search)


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, use_ddp: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare `model` and `optimizer` for this launch: unchanged, replicated on all ranks (DDP) or sharded (FSDP2).

    Without `use_ddp`, replicas begin with the same weights, and a step that calls `average_gradients` keeps them equal.

    Raises:
        UserError: if FSDP2 cannot train them.
    """
    _find_packages_once()
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        check_shardable(plugin.transformer_cls_names_to_wrap, model, optimizer)
        # As with one rank, keep weights and reductions in fp32 under autocast; do not cast everything to low precision.
        plugin.mixed_precision_policy = None
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    if not use_ddp:
        model = accelerator.prepare_model(model, evaluation_mode=True)
        broadcast(model.state_dict())
        return model, accelerator.prepare_optimizer(optimizer)
    accelerator.ddp_handler = ddp_settings(model, accelerator.gradient_accumulation_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate still uses the old name
        return accelerator.prepare(model, optimizer)


def wrap_in_ddp(model: nn.Module, grad_accum: int) -> DistributedDataParallel:
    """Wrap a model that was prepared without DDP as `prepare` would have done."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        return DistributedDataParallel(model, **ddp_settings(model, grad_accum).to_kwargs())


def ddp_settings(model: nn.Module, grad_accum: int) -> DistributedDataParallelKwargs:
    """Return the DDP settings that follow from `model`, so that DDP does not have to search for them in each step."""
    return DistributedDataParallelKwargs(
        broadcast_buffers=_has_batch_norm(model),  # no other layers have buffers that training changes
        bucket_cap_mb=min(math.ceil(_gradient_mib(model)), MAX_BUCKET_MIB),
        gradient_as_bucket_view=True,
        static_graph=grad_accum == 1,  # with gradient accumulation it fails or stops reducing: pytorch #143580
    )


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _gradient_mib(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20


def why_ddp_is_needed(model: nn.Module) -> str | None:
    """What DDP does for replicas of `model` that `average_gradients` does not, or None if it is nothing."""
    if _has_batch_norm(model):
        return "DDP copies the statistics of batch norms from rank 0 in every step"
    if (mib := _gradient_mib(model)) > MAX_BUCKET_MIB:
        return f"DDP sums gradients of {mib:.0f} MiB during the backward pass, and up to {MAX_BUCKET_MIB} MiB after it"
    return None


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Replace the gradients by their mean over all ranks, as DDP does with a single bucket: in one all-reduce.

    Unlike DDP, this can be part of a CUDA graph without further conditions.
    """
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    mean = torch.cat([gradient.flatten() for _, gradient in pairs]).div_(world_size)
    dist.all_reduce(mean)
    for (p, _), part in zip(pairs, mean.split([p.numel() for p, _ in pairs]), strict=True):
        p.grad = part.view_as(p)


def check_shardable(blocks: list[str] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError if FSDP2 can't train `model`, sharded by its `blocks` (class names), with `optimizer`."""
    missing = set(blocks or ()) - {type(module).__name__ for module in model.modules()}
    if missing:
        raise UserError(
            f"the model has no module of class {', '.join(sorted(missing))} to shard by; "
            "set fsdp_transformer_layer_cls_to_wrap to the class of its blocks, "
            "or use DDP: accelerate_configs/multi_gpu.yaml"
        )
    if not (isinstance(optimizer, SHARDABLE) or getattr(optimizer, "shardable", False)):
        raise UserError(
            f"optimizer {type(optimizer).__name__} can't update sharded weights; allowed: adam, adamw, muon, nmuon; "
            "or use DDP: accelerate_configs/multi_gpu.yaml"
        )


def check_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Raise UserError if the checkpoint in folder `path` was saved with FSDP and this launch is without, or vice versa.

    Rank 0 also tries to read an FSDP checkpoint. Only rank 0 loads it later, and if that failed, the other ranks would
    wait forever.
    """
    files = [path / f"{FSDP_MODEL_NAME}.bin", path / f"{OPTIMIZER_NAME}.bin"]
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded != files[0].is_file():
        was, config = ("without FSDP", "multi_gpu.yaml") if sharded else ("with FSDP", "fsdp2.yaml")
        raise UserError(f"{path} was saved {was}; resume it with the same kind of launch, accelerate_configs/{config}")
    if sharded and accelerator.is_main_process:
        try:
            for file in files:
                torch.load(file, weights_only=True)
        except Exception as error:  # a damaged file can raise anything in torch's reader
            raise UserError(f"checkpoint {path} can't be read ({error}); start over with --overwrite") from None


def full_tensor(tensor: Tensor) -> Tensor:
    """Return `tensor`; one that is sharded over the ranks (FSDP2) is gathered on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of `tensor`, sharing its memory; `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_shards(shard: Tensor, like: Tensor) -> Tensor:
    """Return the full tensor of which this rank holds `shard`, sharded as `like` is; `shard` if `like` is not."""
    if not isinstance(like, DTensor):
        return shard
    shape, stride = like.shape, like.stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of `tensor`, which is the same on all ranks, sharded as `like` is; all if it is not."""
    if not isinstance(like, DTensor):
        return tensor
    return (
        DTensor.from_local(tensor, like.device_mesh, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )

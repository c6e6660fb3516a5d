"""DDP and FSDP2: their settings, and checks of what FSDP2 can train."""

import math
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastvit_train.utils.errors import UserError

MAX_BUCKET_MIB = 25
"""gradients of up to this size are all-reduced in one bucket; larger ones in several, overlapping the backward pass"""

SHARDABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that update each element by itself, so that shards need no exchange; ours declare `shardable = True`."""


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare `model` and `optimizer` for this launch: unchanged, replicated on all ranks (DDP) or sharded (FSDP2).

    Raises:
        UserError: if FSDP2 cannot train them.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        check_shardable(plugin.transformer_cls_names_to_wrap, model, optimizer)
        # As with one rank, keep weights and reductions in fp32 under autocast; do not cast everything to low precision.
        plugin.mixed_precision_policy = None
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    accelerator.ddp_handler = ddp_settings(model, accelerator.gradient_accumulation_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate still uses the old name
        return accelerator.prepare(model, optimizer)


def ddp_settings(model: nn.Module, grad_accum: int) -> DistributedDataParallelKwargs:
    """Return the DDP settings that follow from `model`, so that DDP does not have to search for them in each step."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return DistributedDataParallelKwargs(
        broadcast_buffers=norms,  # only batch norms have buffers that training changes
        bucket_cap_mb=min(math.ceil(gradients / 2**20), MAX_BUCKET_MIB),
        gradient_as_bucket_view=True,
        static_graph=grad_accum == 1,  # with gradient accumulation it fails or stops reducing: pytorch #143580
    )


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

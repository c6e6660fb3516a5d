"""How the processes share a model: DDP's settings, and what FSDP2 can train."""

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

ONE_BUCKET_MIB = 25
"""up to so much, all gradients are summed at once; beyond it, those of the last layers while the others are computed"""

SHARDABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose update of a shard is the shard of their update; other classes declare it as `shardable = True`."""


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`model` and `optimizer` as this launch trains them: as they are, each process a copy (DDP) or a part (FSDP2).

    Raises:
        UserError: where they can't be trained in parts.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        check_shardable(plugin.transformer_cls_names_to_wrap, model, optimizer)
        # Weights and their sums in fp32 under autocast, as in one process, instead of everything in low precision.
        plugin.mixed_precision_policy = None
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    accelerator.ddp_handler = ddp_settings(model, accelerator.gradient_accumulation_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # accelerate doesn't know the new name
        return accelerator.prepare(model, optimizer)


def ddp_settings(model: nn.Module, grad_accum: int) -> DistributedDataParallelKwargs:
    """All that DDP can be told of `model` beforehand, so that no step has to find it out."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return DistributedDataParallelKwargs(
        broadcast_buffers=norms,  # before every forward pass; training changes no others
        bucket_cap_mb=min(math.ceil(gradients / 2**20), ONE_BUCKET_MIB),
        gradient_as_bucket_view=True,
        static_graph=grad_accum == 1,  # else it fails or stops summing: pytorch #143580
    )


def check_shardable(blocks: list[str] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError where FSDP2 can't train `model`, cut at its `blocks` (class names), with `optimizer`."""
    missing = set(blocks or ()) - {type(module).__name__ for module in model.modules()}
    if missing:
        raise UserError(
            f"the model has no {', '.join(sorted(missing))} to shard by; "
            "set fsdp_transformer_layer_cls_to_wrap to the class of its blocks, "
            "or take DDP: accelerate_configs/multi_gpu.yaml"
        )
    if not (isinstance(optimizer, SHARDABLE) or getattr(optimizer, "shardable", False)):
        raise UserError(
            f"optimizer {type(optimizer).__name__} can't update sharded weights; allowed: adam, adamw, muon, nmuon; "
            "or take DDP: accelerate_configs/multi_gpu.yaml"
        )


def check_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Raise UserError where the checkpoint in folder `path` was not written as this launch trains, sharded or whole.

    Of a sharded one only the first process reads the weights, and the others would wait for what it can't read.
    """
    files = [path / f"{FSDP_MODEL_NAME}.bin", path / f"{OPTIMIZER_NAME}.bin"]
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded != files[0].is_file():
        was, config = ("whole", "multi_gpu.yaml") if sharded else ("sharded", "fsdp2.yaml")
        raise UserError(f"{path} was written {was}; go on as it began, with accelerate_configs/{config}")
    if sharded and accelerator.is_main_process:
        try:
            for file in files:
                torch.load(file, weights_only=True)
        except Exception as error:  # a damaged file can raise anything in torch's reader
            raise UserError(f"checkpoint {path} can't be read ({error}); start over with --overwrite") from None


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor`; one that the processes hold in parts (FSDP2), put together on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole `tensor`, the same on every process, the part that this one holds of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    replicated = DTensor.from_local(tensor, like.device_mesh, run_check=False)
    return replicated.redistribute(placements=like.placements)

"""The optimizer, by its name in timm."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn

from fastvit_train.config.schema import OptimConfig
from fastvit_train.models import pretrained_cfg
from fastvit_train.training.optim.layers import check_layers
from fastvit_train.training.optim.muon import Muon
from fastvit_train.utils.errors import UserError, did_you_mean

MUON = ("muon", "nmuon")  # nmuon: with Nesterov momentum


def check_optimizer(name: str) -> None:
    """Raise UserError unless timm has an optimizer of that name, in lower or upper case."""
    known = [str(known) for known in list_optimizers()]
    if name.lower().removeprefix("lookahead_") not in known:
        raise UserError(f"unknown optimizer {name!r}{did_you_mean(name, known)}; allowed: {', '.join(known)}")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of all trainable parameters; muon and nmuon are ours, all others are timm's.

    Raises:
        UserError: if the optimizer cannot be built with these settings.
    """
    check_optimizer(config.optimizer)
    name = config.optimizer.lower()
    if name in MUON:
        if config.decay_all:
            raise UserError(f"--decay-all can't be combined with {name}; leave it out or choose another --optimizer")
        groups = _parameter_groups(model, config, fallback_list=_outside_blocks(model))
        momentum = 0.95 if config.momentum is None else config.momentum
        groups = _split_merged_projections(groups, model)
        return Muon(groups, config.lr, momentum=momentum, nesterov=name == "nmuon")
    kwargs: dict[str, Any] = {} if config.momentum is None else {"momentum": config.momentum}
    if _has_fused(name):
        kwargs["fused"] = True
    parameters: Any = model
    if config.layer_decay is not None:
        parameters = _parameter_groups(model, config)
    elif config.decay_all:
        parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        optimizer = create_optimizer_v2(parameters, name, config.lr, config.weight_decay, **kwargs)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which this training loop does not compute")
        return optimizer
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise UserError(f"optimizer {config.optimizer!r} can't be used: {error}") from None


def has_momentum(name: str) -> bool:
    """Whether --momentum has an effect on this optimizer."""
    return get_optimizer_info(name.lower().removeprefix("lookahead_")).has_momentum


def works_in_graph(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer leaves the host nothing to decide, so that a CUDA graph can contain it."""
    return isinstance(optimizer, Muon | torch.optim.Adam | torch.optim.AdamW)


def device_lr(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Return the learning rates of the parameter groups on `device`, (parameter groups,)."""
    return torch.tensor([group["lr"] for group in optimizer.param_groups], device=device)


@contextmanager
def with_device_lr(optimizer: torch.optim.Optimizer, learning_rates: Tensor) -> Iterator[None]:
    """Let the optimizer take its steps with learning rates that are on the device, (parameter groups,)."""
    before = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, learning_rates.unbind(), strict=True):
        group["lr"] = lr
        if "capturable" in group:  # torch's optimizers refuse to be recorded without it
            group["capturable"] = lr.is_cuda
    try:
        yield
    finally:
        for group, (lr, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = capturable


def peak_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the last layer, the highest one if layers have different rates."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def _parameter_groups(
    model: nn.Module, config: OptimConfig, fallback_list: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return timm's parameter groups, by weight decay and with --layer-decay also by layer.

    Raises:
        UserError: if the layers are asked for, and the model does not know them.
    """
    options: dict[str, Any] = {
        "no_weight_decay_list": () if config.decay_all else getattr(model, "no_weight_decay", set)(),
        "fallback_list": fallback_list,
    }
    if config.layer_decay is None:
        return param_groups_weight_decay(model, config.weight_decay, **options)
    check_layers(model, f"--layer-decay {config.layer_decay}")
    return param_groups_layer_decay(
        model,
        config.weight_decay,
        layer_decay=config.layer_decay,
        weight_decay_exclude_1d=not config.decay_all,
        **options,
    )


def _has_fused(name: str) -> bool:
    """Return whether the optimizer can update all parameters in one kernel, as torch's own can on most devices."""
    cls = get_optimizer_class(name.lower().removeprefix("lookahead_"), bind_defaults=False)
    return isinstance(cls, type) and "fused" in inspect.signature(cls).parameters


def _split_merged_projections(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split `groups` so that the merged query, key and value projections are in groups with `merged` = 3."""
    merged = {p for name, p in model.named_parameters() if name.endswith("qkv.weight") and p.shape[0] % 3 == 0}
    halves = [
        {**group, "params": [p for p in group["params"] if (p in merged) == (parts == 3)], "merged": parts}
        for group in groups
        for parts in (1, 3)
    ]
    return [group for group in halves if group["params"]]


def _outside_blocks(model: nn.Module) -> list[str]:
    """Return the parameters that AdamW trains next to Muon: all outside the blocks, or without blocks the head."""
    names = [name for name, _ in model.named_parameters()]
    head = str(pretrained_cfg(model)["classifier"])
    if any(name.startswith("blocks.") for name in names):
        return [name for name in names if not name.startswith("blocks.")]
    return [name for name in names if name.startswith(head)]

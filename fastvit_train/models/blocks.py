"""How the blocks of our models are computed: composed from operators, or by a kernel."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

import fastvit_kernels
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models.vit import Block, ViT
from fastvit_train.models.vit.from_timm import ADAPTED, block_from_timm, is_timm_block, why_not_plain
from fastvit_train.utils.errors import UserError

AUTO = fastvit_kernels.AUTO


def check_block(config: ModelConfig, device: torch.device | None = None) -> None:
    """Raise UserError unless the blocks that `config` names can run on `device`, if given, and with its attention."""
    name = config.block
    if name == "cpp" and device is not None and device.type != "cpu":
        raise UserError(f"--block cpp is for CPUs, and this is {device.type}; give --attention fused --block torch")
    if name == "cpp" and config.attention not in (AUTO, "cpp"):
        raise UserError(
            f"--block cpp computes attention itself: leave --attention {config.attention} out, or use --block torch"
        )
    try:
        if name == "triton":
            fastvit_kernels.check_mlp(name)
        elif name != AUTO:
            fastvit_kernels.check_block(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def set_block(model: nn.Module, name: str) -> None:
    """Set how every block of `model` is computed; "auto" is the same as "torch" until a device is known.

    If `name` is "cpp", the blocks of timm's plain Vision Transformers are replaced with `Block`.
    The parameters do not change.

    Raises:
        UserError: if the kernel does not support the model; the message says why.
    """
    if name in _LIMITS and (reasons := _why_unsupported(model, name)):
        raise UserError(f"--block {name} does not support {', '.join(reasons)}; use --block torch")
    if name == "cpp" and not isinstance(model, ViT):
        _replace_timms_blocks(model)
    for block in _blocks(model):
        block.implementation = "torch" if name == AUTO else name


def _replace_timms_blocks(model: nn.Module) -> None:
    fastvit_kernels.swap_attention(model, "cpp")
    for name, module in list(model.named_modules()):
        if is_timm_block(module):
            model.set_submodule(name, block_from_timm(module))


@contextmanager
def composed(model: nn.Module) -> Iterator[None]:
    """Within this context, compose the blocks of `model` from operators, so that hooks on their parts are called."""
    blocks = _blocks(model)
    names = [block.implementation for block in blocks]
    try:
        for block in blocks:
            block.implementation = "torch"
        yield
    finally:
        for block, name in zip(blocks, names, strict=True):
            block.implementation = name


def choose_block(
    config: ModelConfig, model: nn.Module, accelerator: Accelerator, deterministic: bool
) -> tuple[str, list[str]]:
    """Make `model` compute its blocks by the CPU kernel where it fits, the same on all ranks.

    Args:
        config: settings of the model.
        model: on any device.
        accelerator: rank 0 tries the kernel on its device, under its autocast.
        deterministic: compose blocks from operators, which round alike on more machines.

    Returns:
        The name, and what went wrong, in words.
    """
    result: list[tuple[str, list[str]]] = [("torch", [])]
    on_cpu = accelerator.device.type == "cpu" and isinstance(model, ViT)
    if accelerator.is_main_process and on_cpu and config.attention in (AUTO, "cpp") and not deterministic:
        with accelerator.autocast():
            result = [_try_kernel(model)]
    name, messages = broadcast_object_list(result)[0]
    set_block(model, name)
    return name, messages


def _try_kernel(model: nn.Module) -> tuple[str, list[str]]:
    """Return "cpp" if the kernel supports the model, can be compiled and runs; otherwise "torch", and why."""
    composed = "blocks are composed from operators, which is slower: "
    if reasons := _why_unsupported(model, "cpp"):
        return "torch", [f"{composed}their kernel does not support {', '.join(reasons)}"]
    if lacking := fastvit_kernels.implementations()["cpp"]:
        return "torch", [f"{composed}their kernel {lacking}"]
    probe = copy.deepcopy(_blocks(model)[0]).eval()
    probe.implementation = "cpp"
    try:
        with torch.no_grad():
            probe(torch.zeros(1, 1, probe.mlp.fc1.in_features, dtype=probe.mlp.fc1.weight.dtype))
    except ValueError as error:
        return "torch", [f"{composed}{error}"]
    return "cpp", []


def _blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def _why_unsupported(model: nn.Module, name: str) -> list[str]:
    if not isinstance(model, ViT):
        return _why_timms_unsupported(model, name)
    tokens = _num_tokens(model)
    return sorted({reason for block in _blocks(model) for reason in _LIMITS[name](block, tokens)})


def _num_tokens(model: nn.Module) -> int:
    """Return the tokens of an image; 1 for models such as MobileViT, whose blocks have different numbers of them."""
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    return int(rows * columns + getattr(model, "num_prefix_tokens", 0))


def _why_timms_unsupported(model: nn.Module, name: str) -> list[str]:
    if name == "cpp" and _blocks(model):
        return []  # replaced before
    timms = [module for module in model.modules() if is_timm_block(module)]
    if name != "cpp" or not timms or not fastvit_kernels.can_swap_attention(model):
        plain = " and timm's plain Vision Transformers" if name == "cpp" else ""
        return [f"{type(model).__name__}, only our own models{plain}"]
    if reasons := {reason for block in timms for reason in why_not_plain(block)}:
        return sorted(reasons)
    return sorted({reason for block in timms if (reason := _why_wrong_size(block, _num_tokens(model)))})


def _dropout(block: Block) -> float:
    return max(block.mlp.drop.p, block.mlp.fc2.drop)


def _limits_of_triton(block: Block, tokens: int) -> list[str]:
    dim, most = block.mlp.fc1.in_features, fastvit_kernels.MAX_MLP_DIM
    extras = {
        f"more than {most} channels (embed_dim {dim})": dim > most,
        f"dropout (drop_rate {_dropout(block)})": _dropout(block) > 0,
        "stochastic depth (drop_path_rate)": not isinstance(block.drop_path, nn.Identity),
        "the compact family's residual_norm": block.residual_norm,
        ADAPTED: not all(map(fastvit_kernels.is_plain, block.layers()[3:])),
    }
    return [extra for extra, present in extras.items() if present]


def _limits_of_cpp(block: Block, tokens: int) -> list[str]:
    reason = _why_wrong_size(block, tokens)
    extras = {
        f"dropout (drop_rate {_dropout(block)})": _dropout(block) > 0,
        ADAPTED: not all(map(fastvit_kernels.is_plain, block.layers())),
    }
    return [*(extra for extra, present in extras.items() if present), *([reason] if reason else [])]


def _why_wrong_size(block: Any, tokens: int) -> str | None:
    """Return why the CPU kernel does not support the sizes of a block, ours or timm's, or None if it does."""
    x = torch.empty(1, tokens, block.mlp.fc1.in_features, dtype=torch.float32)
    return fastvit_kernels.why_block_unsupported(x, block.mlp.fc1.out_features, block.attn.num_heads)


_LIMITS: dict[str, Callable[[Block, int], list[str]]] = {"triton": _limits_of_triton, "cpp": _limits_of_cpp}
"""what a block computes that a kernel does not support"""

"""Which attention a model computes with: checked by name, chosen by measurement, put in, and warmed up."""

import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models.registry import OUR_MODELS
from fastvit_train.utils.errors import UserError

AUTO = fastvit_kernels.AUTO
TIMM = "timm"
"""the attention that a model of timm's comes with"""
COMPILING = fastvit_kernels.COMPILING


def attentions() -> list[str]:
    """The names that an attention may have, whether or not it can run here; `timm` serves timm's models alone."""
    return [*fastvit_kernels.implementations(), TIMM]


def check_attention(config: ModelConfig, recorded_in: Path | None = None) -> None:
    """Raise UserError unless `config.attention` is the name of an attention that can run here.

    Args:
        config: the model's.
        recorded_in: the file that the name was read from, if the user did not give it.
    """
    ours = config.model in OUR_MODELS
    if config.attention == TIMM:
        if not ours:
            return
        raise UserError(f"attention {TIMM!r} is what models of timm's come with; {config.model} takes any other name")
    try:
        fastvit_kernels.check_implementation(config.attention)
    except ValueError as error:
        own = "" if ours else f", {TIMM} (the model's own)"
        where = f"; that name is recorded in {recorded_in}, --attention takes another" if recorded_in else ""
        raise UserError(f"{error}{own}{where}") from None


def set_attention(model: nn.Module, name: str) -> None:
    """Let every attention of `model` compute with `name`; "auto" and "timm" leave it as it is.

    Raises:
        UserError: naming the modules that the operator can't serve.
    """
    if name in (AUTO, TIMM):
        return
    try:
        fastvit_kernels.swap_attention(model, name)
    except ValueError as error:
        raise UserError(f"{error}; take --attention {TIMM}, the model's own") from None


def alternatives(model: nn.Module, name: str) -> list[str]:
    """The attentions other than `name` that `model` could compute with here, and fast; none where it keeps its own."""
    if name == TIMM or not fastvit_kernels.can_swap_attention(model):
        return []
    device = next(model.parameters()).device
    names = (other for other, reason in fastvit_kernels.implementations().items() if reason is None)
    return [
        other for other in names if other not in (name, AUTO) and not fastvit_kernels.why_unsupported(other, device)
    ]


def plain_attention(model: nn.Module) -> str:
    """The attention that `model` takes where none is named and nothing is measured."""
    return "fused" if fastvit_kernels.can_swap_attention(model) else TIMM


def pick_attention(model: nn.Module, batch_size: int, image_size: int, device: torch.device) -> tuple[str, list[str]]:
    """The attention that trains `model` fastest, measured, and what to say of it, a line per shape.

    Args:
        model: on any device; it is left as it is.
        batch_size: images per forward pass of one process.
        image_size: side of the input, pixels.
        device: where it will be trained, under the autocast that is on.
    """
    if plain_attention(model) == TIMM:
        return TIMM, [f"attention {TIMM}: the model's own, as the others can't serve it"]
    totals: Counter[str] = Counter()
    choices = []
    for case, calls in _cases(model, batch_size, image_size, device).items():
        choice = fastvit_kernels.choose(**dict(case), device=device)
        choices.append(choice)
        totals.update({name: calls * ms for name, ms in choice.milliseconds.items()})
    fits_all = set.intersection(*(set(choice.milliseconds) for choice in choices))
    return min(fits_all, key=totals.__getitem__), [str(choice) for choice in choices]


def choose_attention(
    model: nn.Module, batch_size: int, image_size: int, accelerator: Accelerator, measure: bool = True
) -> tuple[str, list[str]]:
    """Make `model` compute with the attention that is fastest here, the same one on all ranks.

    Args:
        model: on any device.
        batch_size: images per forward pass of one rank.
        image_size: side of the input in pixels.
        accelerator: rank 0 measures on its device, under its autocast.
        measure: if False, take the plain attention instead.

    Returns:
        The name, and what was measured, in words.
    """
    result: list[Any] = [(plain_attention(model), [])]
    if accelerator.is_main_process and measure:
        with accelerator.autocast():
            result = [pick_attention(model, batch_size, image_size, accelerator.device)]
    name, messages = broadcast_object_list(result)[0]
    set_attention(model, name)
    return name, messages


def _cases(
    model: nn.Module, batch_size: int, image_size: int, device: torch.device
) -> Counter[tuple[tuple[str, Any], ...]]:
    """What the attentions of `model` are called with, as arguments of `fastvit_kernels.choose`, and how often."""
    seen: Counter[tuple[tuple[str, Any], ...]] = Counter()

    def record(module: Any, arguments: tuple[Tensor]) -> None:
        x = arguments[0]
        seen[
            ("shape", (x.shape[0] * batch_size, *x.shape[1:])),
            ("num_heads", module.num_heads),
            ("dtype", x.dtype),
            ("weight_dtype", module.qkv.weight.dtype),
            ("has_bias", module.qkv.bias is not None),
            ("dropout_p", module.attn_drop),
        ] += 1

    probe = copy.deepcopy(model).to(device).eval()
    fastvit_kernels.swap_attention(probe, "fused")
    for module in probe.modules():
        if isinstance(module, fastvit_kernels.SelfAttention):
            module.register_forward_pre_hook(record)
    with torch.no_grad():
        probe(torch.zeros(1, 3, image_size, image_size, device=device))
    return seen


def warm_up(model: nn.Module, train_batch: int, eval_batch: int, image_size: int, device: torch.device) -> float:
    """Seconds that the first passes of `model` take, in training (not with train_batch 0) and in evaluation.

    What compiles in them would else be hidden in the first step. Weights, gradients and random state stay as they are.

    Raises:
        UserError: where the attention can't serve the model's tokens.
    """
    state = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _first_passes(model, train_batch, eval_batch, image_size, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    seconds = time.perf_counter() - started
    model.load_state_dict(state)
    return seconds


def _first_passes(model: nn.Module, train_batch: int, eval_batch: int, image_size: int, device: torch.device) -> None:
    for _ in range(1 if device.type == "cpu" else 3):  # a CUDA graph is recorded on the second pass
        if train_batch:
            model.train()(torch.zeros(train_batch, 3, image_size, image_size, device=device)).float().sum().backward()
            model.zero_grad()
        with torch.no_grad():
            model.eval()(torch.zeros(eval_batch, 3, image_size, image_size, device=device))
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

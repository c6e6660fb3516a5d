"""The attention implementation of a model: checked, measured, set, and warmed up."""

import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models.registry import OUR_MODELS
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import synchronize

AUTO = fastvit_kernels.AUTO
TIMM = "timm"
"""the attention of timm's own models"""
COMPILING = fastvit_kernels.COMPILING


def attentions() -> list[str]:
    """Return all attention names, available here or not; `timm` applies to timm's models only."""
    return [*fastvit_kernels.implementations(), TIMM]


def check_attention(config: ModelConfig, device: torch.device | None = None, recorded_in: Path | None = None) -> None:
    """Raise UserError unless the attention that `config` names can run here.

    Args:
        config: settings of the model.
        device: where the model will be; None if that is not known yet.
        recorded_in: the file that the name was read from, if the user did not give it.
    """
    ours = config.model in OUR_MODELS
    if config.attention == TIMM:
        if not ours:
            return
        raise UserError(f"attention {TIMM!r} is for timm's own models; {config.model} takes any other name")
    try:
        fastvit_kernels.check_implementation(config.attention)
        if config.attention == "cpp" and device is not None and device.type != "cpu":
            raise ValueError(f"attention implementation 'cpp' is for CPUs, and this is {device.type}; take fused")
    except ValueError as error:
        own = "" if ours else f", {TIMM} (the model's own)"
        where = f"; that name is recorded in {recorded_in}; choose another with --attention" if recorded_in else ""
        raise UserError(f"{error}{own}{where}") from None


def set_attention(model: nn.Module, name: str) -> None:
    """Set the implementation of every attention of `model`; "auto" and "timm" change nothing.

    Raises:
        UserError: if the operator does not support some of the model's attention modules; the message names them.
    """
    if name in (AUTO, TIMM):
        return
    try:
        fastvit_kernels.swap_attention(model, name)
    except ValueError as error:
        raise UserError(f"{error}; use --attention {TIMM}, the model's own") from None


def alternatives(model: nn.Module, name: str) -> list[str]:
    """Return the attentions other than `name` that `model` could use here at full speed; none if it keeps its own."""
    if name == TIMM or not fastvit_kernels.can_swap_attention(model):
        return []
    device = next(model.parameters()).device
    names = (other for other, reason in fastvit_kernels.implementations().items() if reason is None)
    return [
        other for other in names if other not in (name, AUTO) and not fastvit_kernels.why_unsupported(other, device)
    ]


def plain_attention(model: nn.Module) -> str:
    """Return the attention that `model` uses if the user names none and nothing is measured."""
    return "fused" if fastvit_kernels.can_swap_attention(model) else TIMM


def pick_attention(
    model: nn.Module, batch_size: int, input_size: InputSize, device: torch.device, compiled: bool = False
) -> tuple[str, list[str]]:
    """Return the attention to train `model` with: the preferred one, unless another is measured to be clearly faster.

    Args:
        model: on any device; it is not changed.
        batch_size: images per forward pass of one rank.
        input_size: channels, height and width of the input.
        device: the device to measure on, under the current autocast.
        compiled: whether the model will be compiled.

    Returns:
        The name of the attention, and one line per shape that reports what was measured.
    """
    if plain_attention(model) == TIMM:
        return TIMM, [f"attention {TIMM}: the model's own; the others do not support this model"]
    cases = _cases(model, batch_size, input_size, device)
    mode: fastvit_kernels.Mode = "compiled" if compiled else "eager"
    choices = [fastvit_kernels.choose(**dict(case), device=device, mode=mode) for case in cases]
    fits_all = [name for name in choices[0].samples if all(name in choice.samples for choice in choices)]
    calls = list(cases.values())
    totals = {name: _add_up([choice.samples[name] for choice in choices], calls) for name in fits_all}
    return fastvit_kernels.preferred(totals), [str(choice) for choice in choices]


def _add_up(samples: list[tuple[float, ...]], calls: list[int]) -> tuple[float, ...]:
    """Return the milliseconds of all attention calls of the model, for each part of the rounds."""
    parts = zip(*samples, strict=True)
    return tuple(sum(ms * number for ms, number in zip(part, calls, strict=True)) for part in parts)


def choose_attention(
    model: nn.Module,
    batch_size: int,
    input_size: InputSize,
    accelerator: Accelerator,
    measure: bool = True,
    compiled: bool = False,
) -> tuple[str, list[str]]:
    """Make `model` compute with the attention that suits this machine best, the same one on all ranks.

    Args:
        model: on any device.
        batch_size: images per forward pass of one rank.
        input_size: channels, height and width of the input.
        accelerator: rank 0 measures on its device, under its autocast.
        measure: if False, take the plain attention instead.
        compiled: whether the model will be compiled.

    Returns:
        The name, and what was measured, in words.
    """
    result: list[Any] = [(plain_attention(model), [])]
    if accelerator.is_main_process and measure:
        with accelerator.autocast():
            result = [pick_attention(model, batch_size, input_size, accelerator.device, compiled)]
    name, messages = broadcast_object_list(result)[0]
    set_attention(model, name)
    return name, messages


def _cases(
    model: nn.Module, batch_size: int, input_size: InputSize, device: torch.device
) -> Counter[tuple[tuple[str, Any], ...]]:
    """Return the arguments for `fastvit_kernels.choose` that describe each attention call of `model`, with counts."""
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
        probe(torch.zeros(1, *input_size, device=device))
    return seen


def warm_up(model: nn.Module, train_batch: int, eval_batch: int, input_size: InputSize, device: torch.device) -> float:
    """Run the first passes of `model`, in training and in evaluation, and return the seconds that they take.

    Otherwise compilation would be part of the first step. Weights, gradients and random state do not change.

    Args:
        model: on `device`.
        train_batch: images of a training pass; 0 for no training pass.
        eval_batch: images of an evaluation pass.
        input_size: channels, height and width of the input.
        device: the device of the model.

    Raises:
        UserError: if the attention does not support the model's shapes.
    """
    state = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _first_passes(model, train_batch, eval_batch, input_size, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    seconds = time.perf_counter() - started
    model.load_state_dict(state)
    return seconds


def _first_passes(
    model: nn.Module, train_batch: int, eval_batch: int, input_size: InputSize, device: torch.device
) -> None:
    for _ in range(1 if device.type == "cpu" else 3):  # a CUDA graph is recorded on the second pass
        if train_batch:
            # As in a step, logits and loss live until after the backward pass: CUDA graphs depend on it.
            logits = model.train()(torch.zeros(train_batch, *input_size, device=device))
            loss = F.cross_entropy(logits, torch.zeros(train_batch, dtype=torch.int64, device=device))
            loss.backward()
            model.zero_grad()
        with torch.no_grad():
            model.eval()(torch.zeros(eval_batch, *input_size, device=device))
    synchronize(device)

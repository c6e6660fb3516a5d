"""`models` and `recipes`: tables of what a run can be configured with."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import nn

from fastvit_train.config.recipes import RECIPES, recipe
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import ModelConfig, OptimConfig
from fastvit_train.distributed import accelerator
from fastvit_train.distributed.cpu_threads import use_all_cores
from fastvit_train.models import OUR_MODELS, build_model, native_input_size, plain_attention, set_attention
from fastvit_train.models.resolve import resolve
from fastvit_train.models.shapes import stages, tokens
from fastvit_train.profiling.roofline import count_flops
from fastvit_train.profiling.speedups import GPU_STEPS, STEPS
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.utils import memory
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, did_you_mean, printable
from fastvit_train.utils.timing import quartiles, time_in_rounds

CLASSES = 10
BATCH_SIZES = {"cpu": 8}
GPU_BATCH_SIZE = 256
WARM_UP_ROUNDS, ROUNDS = 2, 3
MAX_MEASURED = 12
"""limit on the models that are measured at a time, so that measuring takes only seconds"""
UNKNOWN = "-"


@dataclass(frozen=True)
class ModelEntry:
    """A model with 10 classes, and the cost of one image of the model's native size."""

    name: str
    description: str
    parameters: int
    tokens: int | None
    """None for a model without tokens"""
    flops: float | None
    """of a forward pass; None if they can't be counted"""


@dataclass(frozen=True)
class Throughput:
    """Images per second on this machine."""

    training: float
    inference: float


def show_models(pattern: str | None, measure: bool) -> None:
    """Print a table of our models, or of all models whose names match `pattern`.

    Args:
        pattern: the names to list, with the wildcards `*` and `?`; None for our models.
        measure: whether to measure the throughput of training and inference on this machine.

    Raises:
        UserError: if no name matches, or if more match than can be measured at a time.
    """
    names = _match_names(pattern)
    if measure and len(names) > MAX_MEASURED:
        raise UserError(
            f"--pattern {pattern} matches {len(names)} models, and at most {MAX_MEASURED} are measured at a time; "
            "give a narrower pattern, or --no-measure"
        )
    entries, notes = _describe_all(names)
    notes += [
        "MFLOPs: of one image's forward pass; matrix products and convolutions only, a multiply and an add count as 2"
    ]
    throughputs: dict[str, Throughput] = {}
    if measure:
        use_all_cores()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        batch_size = BATCH_SIZES.get(device.type, GPU_BATCH_SIZE)
        throughputs = measure_throughputs([entry.name for entry in entries], batch_size, device)
        notes += [
            "img/s: throughput of training steps (AdamW) and of inference, without the input; medians of interleaved "
            f"rounds; batch {batch_size}, fp32, attention fused (timm's own if a model has no other), not compiled; "
            f"{accelerator.device_name(device)}"
        ]
    descriptions = {entry.name: entry.description for entry in entries}
    _print_catalog(_models_table(entries, throughputs), descriptions, notes)


def _match_names(pattern: str | None) -> list[str]:
    if pattern is None:
        return OUR_MODELS
    names = timm.list_models(pattern)
    if not names:
        hint = did_you_mean(pattern.strip("*?"), timm.list_models())
        raise UserError(f"--pattern {pattern} matches no model{hint}; a * matches any text, as in vit_tiny*")
    return names


def _describe_all(names: Sequence[str]) -> tuple[list[ModelEntry], list[str]]:
    """Describe each model, and note those that can't be built."""
    entries, left_out = [], []
    for name in names:
        try:
            entries.append(describe(name))
        except UserError as error:
            left_out.append(f"left out: {error}")
    return entries, left_out


def describe(name: str) -> ModelEntry:
    """Describe a model; UserError if it can't be built."""
    parameters, token_count, flops = _count_sizes(ModelConfig(name), native_input_size(name), CLASSES)
    doc = (inspect.getdoc(timm.model_entrypoint(name)) or "").partition("\n")[0]
    description = doc.partition(";")[0].removesuffix(".")
    return ModelEntry(name, description, parameters, token_count, flops)


def _count_sizes(config: ModelConfig, input_size: InputSize, classes: int) -> tuple[int, int | None, float | None]:
    """Count the parameters, the tokens and the FLOPs of one image's forward pass, without allocating the weights.

    Args:
        config: settings of the model.
        input_size: channels, height and width of the input.
        classes: number of classes.
    """
    with torch.device("meta"):
        model = build_model(config, input_size, classes).eval()
        with suppress(UserError):  # some of timm's models only have their own attention
            set_attention(model, "fused")
        parts, flops = [], None
        with suppress(Exception), torch.no_grad():  # some of timm's models read values, which meta tensors don't have
            parts = stages(model, input_size)
            flops = count_flops(lambda: model(torch.zeros(1, *input_size)))
    return sum(p.numel() for p in model.parameters()), tokens(parts), flops


def measure_throughputs(names: Sequence[str], batch_size: int, device: torch.device) -> dict[str, Throughput]:
    """Measure training steps and inference of all models in interleaved rounds."""
    if device.type == "cpu":
        memory.retain_freed_memory()
    runs = [run for name in names for run in _build_passes(name, batch_size, device)]
    calls = STEPS.get(device.type, GPU_STEPS)
    time_in_rounds(runs, WARM_UP_ROUNDS, device)
    times = time_in_rounds(runs, ROUNDS, device, calls)
    rates = [batch_size * calls / quartiles(seconds).median for seconds in times]
    return {name: Throughput(*rates[2 * i : 2 * i + 2]) for i, name in enumerate(names)}


def _build_passes(name: str, batch_size: int, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """Build a training step and an inference pass of two copies of a model."""
    size = native_input_size(name)
    images = torch.randn(batch_size, *size, device=device)
    labels = torch.arange(batch_size, device=device) % CLASSES
    train_model, eval_model = (_build_on_device(name, size, device) for _ in range(2))
    optimizer = build_optimizer(train_model.train(), OptimConfig())
    eval_model.eval()

    def step() -> None:
        F.cross_entropy(train_model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def infer() -> None:
        eval_model(images)

    return step, infer


def _build_on_device(name: str, size: InputSize, device: torch.device) -> nn.Module:
    model = build_model(ModelConfig(name), size, CLASSES).to(device)
    set_attention(model, plain_attention(model))
    return model


def _models_table(entries: Sequence[ModelEntry], throughputs: dict[str, Throughput]) -> Table:
    measured = ("train img/s", "infer img/s") if throughputs else ()
    table = _make_table("model", "parameters", "tokens", "MFLOPs", *measured)
    for entry in entries:
        throughput = throughputs.get(entry.name)
        rates = (f"{throughput.training:,.0f}", f"{throughput.inference:,.0f}") if throughput else ()
        table.add_row(
            entry.name, f"{entry.parameters:,}", f"{entry.tokens or UNKNOWN}", _format_mflops(entry.flops), *rates
        )
    return table


def _format_mflops(flops: float | None) -> str:
    return UNKNOWN if flops is None else f"{flops / 1e6:,.1f}"


def show_recipes() -> None:
    """Print a table of the recipes."""
    table = _make_table("recipe", "model", "data set", "epochs", "batch", "parameters", "MFLOPs")
    for name in RECIPES:
        config = resolve(recipe(name))
        parameters, _, flops = _count_sizes(config.model, config.input_size, config.num_classes)
        table.add_row(
            name,
            config.model.model,
            config.data.dataset,
            str(config.run.epochs),
            str(config.run.batch_size),
            f"{parameters:,}",
            _format_mflops(flops),
        )
    descriptions = {name: inspect.getdoc(make) or "" for name, make in RECIPES.items()}
    note = (
        "`recipes NAME` shows all settings of a recipe as YAML for --config; `--recipe NAME --dry-run` estimates its "
        "training time on this machine"
    )
    _print_catalog(table, descriptions, [note])


def _make_table(first_column: str, *columns: str) -> Table:
    table = Table(first_column, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "data set") else "right")
    return table


def _print_catalog(table: Table, descriptions: dict[str, str], notes: Sequence[str]) -> None:
    """Print the table, a description of each of its rows, and notes on what its numbers mean."""
    description_table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in descriptions.items():
        if text:
            description_table.add_row(name, escape(printable(text)))
    console = Terminal()
    for part in (table, "", description_table, "", *notes):
        console.print(part, markup=False)

"""What there is to choose from: the models, and the recipes."""

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
from fastvit_train.config.schema import ModelConfig, OptimConfig
from fastvit_train.distributed import accelerator, env
from fastvit_train.models import OUR_MODELS, build_model, native_image_size, plain_attention, set_attention
from fastvit_train.models.resolve import resolve
from fastvit_train.models.shapes import stages, tokens
from fastvit_train.profiling.roofline import count_flops
from fastvit_train.profiling.speedups import GPU_STEPS, STEPS
from fastvit_train.runs.run_folder import config_to_yaml
from fastvit_train.training.optimizer import build_optimizer
from fastvit_train.utils import memory
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, did_you_mean, printable
from fastvit_train.utils.timing import quartiles, time_in_rounds

CLASSES = 10
BATCH_SIZES = {"cpu": 8}
GPU_BATCH_SIZE = 256
WARM_UP_ROUNDS, ROUNDS = 2, 3
MOST_MEASURED = 12
"""models at a time, so that it takes seconds"""
UNKNOWN = "-"


@dataclass(frozen=True)
class Entry:
    """A model by name, for one image of its own size and 10 classes."""

    name: str
    what: str
    parameters: int
    tokens: int | None
    flops: float | None
    """of a forward pass; None where it can't be counted"""


@dataclass(frozen=True)
class Speed:
    """Images per second on this machine."""

    training: float
    inference: float


def show_models(pattern: str | None, measure: bool) -> None:
    """Print the table of our models, or of all whose names fit `pattern`, a shell's with `*` and `?`.

    Raises:
        UserError: where no name fits, or too many to be measured.
    """
    names = _names(pattern)
    if measure and len(names) > MOST_MEASURED:
        raise UserError(
            f"--pattern {pattern} fits {len(names)} models, and up to {MOST_MEASURED} are measured at a time; "
            "narrow it, or give --no-measure"
        )
    entries, said = _entries(names)
    said += ["MFLOPs: of an image's forward pass; matrix products and convolutions, a multiply and an add are 2"]
    speeds: dict[str, Speed] = {}
    if measure:
        env.use_all_cores()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        batch_size = BATCH_SIZES.get(device.type, GPU_BATCH_SIZE)
        speeds = measure_speeds([entry.name for entry in entries], batch_size, device)
        said += [
            "img/s: of a training step (AdamW) and of inference, without the input; measured in turn, medians; "
            f"batch {batch_size}, fp32, attention fused (timm's own where it can't be had), not compiled; "
            f"{accelerator.device_name(device)}"
        ]
    _print(_models_table(entries, speeds), {entry.name: entry.what for entry in entries}, said)


def _names(pattern: str | None) -> list[str]:
    if pattern is None:
        return OUR_MODELS
    names = timm.list_models(pattern)
    if not names:
        hint = did_you_mean(pattern.strip("*?"), timm.list_models())
        raise UserError(f"--pattern {pattern} fits no model{hint}; a * in it stands for anything, as in vit_tiny*")
    return names


def _entries(names: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """What can be told of each, and of which of them nothing can."""
    entries, left_out = [], []
    for name in names:
        try:
            entries.append(describe(name))
        except UserError as error:
            left_out.append(f"left out: {error}")
    return entries, left_out


def describe(name: str) -> Entry:
    """What can be told of a model; UserError where it can't be built."""
    parameters, passed, flops = _sizes(ModelConfig(name), native_image_size(name), CLASSES)
    doc = (inspect.getdoc(timm.model_entrypoint(name)) or "").partition("\n")[0]
    what = doc.partition(";")[0].removesuffix(".")
    return Entry(name, what, parameters, passed, flops)


def _sizes(config: ModelConfig, size: int, classes: int) -> tuple[int, int | None, float | None]:
    """Parameters, tokens and FLOPs of an image's forward pass, without taking memory for the weights.

    Args:
        config: the model's.
        size: side of its input, pixels.
        classes: its outputs.
    """
    with torch.device("meta"):
        model = build_model(config, size, classes).eval()
        with suppress(UserError):  # a model that keeps its own attention
            set_attention(model, "fused")
        passed, flops = [], None
        with suppress(Exception), torch.no_grad():  # some of timm's ask for values, and there are none
            passed = stages(model, size)
            flops = count_flops(lambda: model(torch.zeros(1, 3, size, size)))
    return sum(p.numel() for p in model.parameters()), tokens(passed), flops


def measure_speeds(names: Sequence[str], batch_size: int, device: torch.device) -> dict[str, Speed]:
    """Training steps and inference of each, all of them in turn."""
    if device.type == "cpu":
        memory.retain_freed_memory()
    runs = [run for name in names for run in _passes(name, batch_size, device)]
    calls = STEPS.get(device.type, GPU_STEPS)
    time_in_rounds(runs, WARM_UP_ROUNDS, device)
    times = time_in_rounds(runs, ROUNDS, device, calls)
    rates = [batch_size * calls / quartiles(seconds).median for seconds in times]
    return {name: Speed(*rates[2 * i : 2 * i + 2]) for i, name in enumerate(names)}


def _passes(name: str, batch_size: int, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and a forward pass of two copies of a model."""
    size = native_image_size(name)
    images = torch.randn(batch_size, 3, size, size, device=device)
    labels = torch.arange(batch_size, device=device) % CLASSES
    learning, trained = (_ready(name, size, device) for _ in range(2))
    optimizer = build_optimizer(learning.train(), OptimConfig())
    trained.eval()

    def step() -> None:
        F.cross_entropy(learning(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def infer() -> None:
        trained(images)

    return step, infer


def _ready(name: str, size: int, device: torch.device) -> nn.Module:
    model = build_model(ModelConfig(name), size, CLASSES).to(device)
    set_attention(model, plain_attention(model))
    return model


def _models_table(entries: Sequence[Entry], speeds: dict[str, Speed]) -> Table:
    measured = ("train img/s", "infer img/s") if speeds else ()
    table = _figures("model", "parameters", "tokens", "MFLOPs", *measured)
    for entry in entries:
        speed = speeds.get(entry.name)
        rates = (f"{speed.training:,.0f}", f"{speed.inference:,.0f}") if speed else ()
        table.add_row(entry.name, f"{entry.parameters:,}", f"{entry.tokens or UNKNOWN}", _mega(entry.flops), *rates)
    return table


def _mega(flops: float | None) -> str:
    return UNKNOWN if flops is None else f"{flops / 1e6:,.1f}"


def show_recipes() -> None:
    """Print the table of the recipes."""
    table = _figures("recipe", "model", "data set", "epochs", "batch", "optimizer", "parameters", "MFLOPs")
    for name in RECIPES:
        config = resolve(recipe(name))
        parameters, _, flops = _sizes(config.model, config.image_size, config.num_classes)
        run, choice = config.run, config.optim
        table.add_row(
            name,
            config.model.model,
            config.data.dataset,
            *(str(run.epochs), str(run.batch_size), choice.optimizer),
            *(f"{parameters:,}", _mega(flops)),
        )
    what = {name: inspect.getdoc(make) or "" for name, make in RECIPES.items()}
    how = "as --config takes them; `--recipe NAME --dry-run` measures its speed here"
    _print(table, what, [f"`recipes NAME` shows all settings of one, {how}"])


def recipe_yaml(name: str) -> str:
    """The settings of a recipe, as a --config file holds them; UserError where there is none of that name."""
    return config_to_yaml(recipe(name))


def _figures(name: str, *columns: str) -> Table:
    table = Table(name, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "data set", "optimizer") else "right")
    return table


def _print(table: Table, what: dict[str, str], said: Sequence[str]) -> None:
    """The table, what there is to say of each of its rows, and what it rests on."""
    words = Table.grid(padding=(0, 2, 0, 0))
    for name, text in what.items():
        if text:
            words.add_row(name, escape(printable(text)))
    console = Terminal()
    for part in (table, "", words, "", *said):
        console.print(part, markup=False)

"""What a report says of runs in words and tables: figures, settings that differ, commands to repeat them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastvit_train.config.overrides import marked, override, to_plain
from fastvit_train.config.recipes import recipe
from fastvit_train.config.validation import Mark
from fastvit_train.inference.report.records import Record
from fastvit_train.models.resolve import fill_defaults
from fastvit_train.runs.comparison import MAX_TEXT_LENGTH, SUMMARY_ROWS
from fastvit_train.utils.errors import UserError, printable

NOTHING = "—"
ENERGY = "energy, J"
SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    **SUMMARY_ROWS,
    "peak memory, MiB": lambda s: f"{s['peak_memory_mib']:,.0f}",
    ENERGY: lambda s: f"{s['energy_joules']:,.0f}",
}
"""rows of the table of runs: each figure from summary.json"""
SET_AGAINST = {
    "parameters": "parameters",
    "model size, MB": "model_size_mb",
    "train loss": "train_loss",
    "test loss": "test_loss",
    "accuracy": "test_accuracy",
    "best epoch's accuracy": "best_test_accuracy",
    "training time": "train_seconds",
    "images/s": "images_per_second",
    "peak memory, MiB": "peak_memory_mib",
    ENERGY: "energy_joules",
}
"""figures that two runs' difference is told of, as summary.json names them"""
ENVIRONMENT = ("device", "world_size", "mixed_precision", "attention", "seed", "batch_size", "steps")
UNREADABLE = (KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    differs: bool = False


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]
    """a name and a cell for each of the head's"""


def figures(records: Sequence[Record]) -> Table:
    """A row per figure, a column per run, and with two runs one of their difference."""
    head = [record.name for record in records]
    rows = [(name, [_figure(name, record) for record in records]) for name in SHOWN]
    if not any(record.epochs for record in records):  # models alone, of which there is little to say
        rows = [(name, cells) for name, cells in rows if any(cell.text != NOTHING for cell in cells)]
    if len(records) == 2:
        head.append("difference")
        rows = [(name, [*cells, Cell(_difference(name, *records))]) for name, cells in rows]
    return Table(tuple(head), rows)


def _figure(name: str, record: Record) -> Cell:
    try:
        return Cell(printable(SHOWN[name](record.summary))[:MAX_TEXT_LENGTH])
    except UNREADABLE:
        why = record.summary.get("energy_unmeasured") if name == ENERGY else None
        return Cell(NOTHING, printable(str(why or "not recorded"))[:MAX_TEXT_LENGTH])


def _difference(name: str, first: Record, second: Record) -> str:
    """By how much the second run's figure is above the first's."""
    try:
        before, after = (float(record.summary[SET_AGAINST[name]]) for record in (first, second))
        return f"{100 * (after - before):+.2f} points" if "accuracy" in name else f"{after / before - 1:+.2%}"
    except (*UNREADABLE, ZeroDivisionError):
        return ""


def result(record: Record) -> str:
    """A run in a line."""
    said = {name: _figure(name, record).text for name in SHOWN}
    what = f"{said['model']}, {said['parameters']} parameters"
    if said["accuracy"] == NOTHING:
        return f"{what}; its accuracy is not recorded"
    return f"{said['accuracy']} on {said['data']}; {what}; {said['epochs']} epochs in {said['training time']}"


def verdict(records: Sequence[Record]) -> str:
    """Two runs in a sentence: which is more accurate, by how much, by how many images; nothing where it isn't known."""
    if len(records) != 2 or len({_figure("data", record).text for record in records}) != 1:
        return ""
    try:
        low, high = sorted(records, key=lambda record: float(record.summary["test_accuracy"]))
        gap = high.summary["test_accuracy"] - low.summary["test_accuracy"]
        images = int(high.summary["evaluated_images"])
        differing = round(gap * images)
        accuracies = f"{high.summary['test_accuracy']:.2%} against {low.summary['test_accuracy']:.2%}"
    except UNREADABLE:
        return ""
    if gap == 0:
        return f"{high.name} and {low.name} are equally accurate: {accuracies}."
    return (
        f"{high.name} is {100 * gap:.2f} points more accurate than {low.name}: {accuracies}, "
        f"which is {differing:,} of {images:,} images."
    )


def settings(records: Sequence[Record]) -> Table:
    """The settings that aren't the same in all runs; of a single one those that aren't its recipe's.

    Raises:
        UserError: where its recipe can't be had.
    """
    columns = [(record.name, record.settings) for record in records if record.settings]
    if len(columns) == 1:
        columns.insert(0, (f"recipe {printable(str(columns[0][1].get('recipe')))}", recipe_of(columns[0][1])))
    keys = dict.fromkeys(key for _, own in columns for key in own if key not in marked(Mark.RUN_NAME))
    rows = []
    for key in keys:
        first, *others = [own.get(key) for _, own in columns]
        if any(value != first for value in others):
            rows.append((printable(key), [Cell(_value(first)), *(Cell(_value(v), differs=v != first) for v in others)]))
    return Table(tuple(name for name, _ in columns), rows)


def recipe_of(own: dict[str, Any]) -> dict[str, Any]:
    """The settings, flat, of the recipe that `own` name, with what depends on the model as it is for theirs.

    Raises:
        UserError: where there is no such recipe, or no such model.
    """
    base = recipe(str(own.get("recipe")))
    for_model = fill_defaults(override(base, {"model": own.get("model", base.model.model)}, "config.yaml"))
    return {**to_plain(for_model), "model": base.model.model}


def _value(value: Any) -> str:
    return "not set" if value is None else printable(str(value))[:MAX_TEXT_LENGTH]


def commands(record: Record) -> list[tuple[str, str]]:
    """How to repeat a run: what by, and the command."""
    if record.folder is None or not record.settings:
        return []
    start = ["accelerate", "launch", *_launch_flags(record.summary), "-m", "fastvit_train"]
    again = ["--exp-name", "again"]
    found = [("from its settings", [*start, "--config", str(record.folder / "config.yaml"), *again])]
    try:
        base = recipe_of(record.settings)
    except UserError:  # the table of settings says why
        return [(how, printable(shlex.join(words))) for how, words in found]
    changed = [
        word
        for key, value in record.settings.items()
        if key not in marked(Mark.RUN_NAME) and base.get(key) != value
        for word in _flag(key, value)
    ]
    found.append(("by flags", [*start, "--recipe", str(record.settings.get("recipe")), *changed, *again]))
    return [(how, printable(shlex.join(words))) for how, words in found]


def _launch_flags(summary: dict[str, Any]) -> list[str]:
    precision, processes = summary.get("mixed_precision", "no"), summary.get("world_size", 1)
    flags = [] if precision == "no" else ["--mixed_precision", str(precision)]
    if isinstance(processes, int) and processes > 1:
        flags += ["--multi_gpu", "--num_processes", str(processes)]
    return flags


def _flag(key: str, value: Any) -> list[str]:
    """A setting as the command line takes it."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def environment(record: Record) -> list[tuple[str, str]]:
    """What the run was trained on and with."""
    versions = record.summary.get("versions")
    known = {key.replace("_", " "): record.summary.get(key) for key in ENVIRONMENT}
    known |= versions if isinstance(versions, dict) else {}
    return [(printable(name), printable(str(v))[:MAX_TEXT_LENGTH]) for name, v in known.items() if v is not None]

"""Sentences and tables of a report: results, settings that differ, commands to reproduce the runs."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastvit_train.config.overrides import flatten, marked, override, to_plain
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import Mark
from fastvit_train.inference.report.records import RunRecord
from fastvit_train.models.resolve import fill_defaults
from fastvit_train.runs.comparison import (
    BALANCED,
    ENERGY_PER_IMAGE,
    MISSING,
    SUMMARY_ROWS,
    differing_settings,
    format_setting,
)
from fastvit_train.runs.results import INVALID, MAX_TEXT_LENGTH
from fastvit_train.utils.errors import UserError, counted, printable

ENERGY = "energy, J"
RESULT_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    **SUMMARY_ROWS,
    "peak memory, MiB": lambda s: f"{s['peak_memory_mib']:,.0f}",
    ENERGY: lambda s: f"{s['energy_joules']:,.0f}",
}
"""rows of the table of results: a name, and a function that formats the value in a summary"""
SUMMARY_KEYS = {
    "parameters": "parameters",
    "model size, MB": "model_size_mb",
    "train loss": "train_loss",
    "test loss": "test_loss",
    "accuracy": "test_accuracy",
    BALANCED: "balanced_test_accuracy",
    "highest accuracy": "best_test_accuracy",
    "training time": "train_seconds",
    "images/s": "images_per_second",
    "peak memory, MiB": "peak_memory_mib",
    ENERGY_PER_IMAGE: "energy_joules_per_image",
    ENERGY: "energy_joules",
}
"""rows that show the difference between two runs, with the keys of their values in summary.json"""
DEFAULTS = flatten(TrainConfig())
ENVIRONMENT_KEYS = ("device", "world_size", "mixed_precision", "attention", "seed", "batch_size", "steps")


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    note: str = ""
    """shown in small print after the text"""
    differs: bool = False
    """whether the value differs from the one in the first column"""


@dataclass(frozen=True)
class Table:
    """A table with named columns and rows."""

    head: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]
    """a name, and a cell for each column of `head`"""


@dataclass(frozen=True)
class Headline:
    """The most important results of a run."""

    accuracy: str
    """shown large; empty if it is not known"""
    details: str


def results(records: Sequence[RunRecord]) -> Table:
    """Return a table with a column per run and, for two runs, a column with the difference."""
    head = [record.name for record in records]
    rows = [(name, [_result_cell(name, record) for record in records]) for name in RESULT_ROWS]
    if not any(record.epochs for record in records):  # without training runs, most rows are empty
        rows = [(name, cells) for name, cells in rows if any(cell.text != MISSING for cell in cells)]
    if len(records) == 2:
        head.append("difference")
        rows = [(name, [*cells, Cell(_difference(name, *records))]) for name, cells in rows]
    return Table(tuple(head), rows)


def _result_cell(name: str, record: RunRecord) -> Cell:
    try:
        return Cell(printable(RESULT_ROWS[name](record.summary))[:MAX_TEXT_LENGTH])
    except INVALID:
        why = record.summary.get("energy_unmeasured") if name in (ENERGY_PER_IMAGE, ENERGY) else None
        return Cell(MISSING, printable(str(why or "not recorded"))[:MAX_TEXT_LENGTH])


def _difference(name: str, first: RunRecord, second: RunRecord) -> str:
    """Return the second run's value minus the first run's, in percentage points or relative to the first."""
    try:
        first_value, second_value = (float(record.summary[SUMMARY_KEYS[name]]) for record in (first, second))
        return (
            f"{100 * (second_value - first_value):+.2f} points"
            if "accuracy" in name
            else f"{second_value / first_value - 1:+.2%}"
        )
    except (*INVALID, ZeroDivisionError):
        return ""


def headline(record: RunRecord) -> Headline:
    """Return the most important results of a run."""
    texts = {name: _result_cell(name, record).text for name in RESULT_ROWS}
    model = f"{texts['model']}, {texts['parameters']} parameters"
    if texts["accuracy"] == MISSING:
        return Headline("", f"{model}; its accuracy is not recorded")
    trained = f"{counted(texts['epochs'], 'epoch')} in {texts['training time']}"
    return Headline(texts["accuracy"], f"accuracy on {texts['data']}; {model}; {trained}")


def verdict(records: Sequence[RunRecord]) -> str:
    """Return a sentence on which of two runs is more accurate, and by how much; empty if that is not known."""
    if len(records) != 2 or len({_result_cell("data", record).text for record in records}) != 1:
        return ""
    try:
        low, high = sorted(records, key=lambda record: float(record.summary["test_accuracy"]))
        gap = high.summary["test_accuracy"] - low.summary["test_accuracy"]
        images = int(high.summary["evaluated_images"])
        num_differing = round(gap * images)
        accuracies = f"{high.summary['test_accuracy']:.2%} against {low.summary['test_accuracy']:.2%}"
    except INVALID:
        return ""
    if gap == 0:
        return f"{high.name} and {low.name} are equally accurate: {accuracies}."
    return (
        f"{high.name} is {100 * gap:.2f} percentage points more accurate than {low.name}: {accuracies}, "
        f"a difference of {num_differing:,} of {counted(images, 'image')}."
    )


def settings(records: Sequence[RunRecord]) -> Table:
    """Return the settings that differ between the runs, or between a single run and its recipe.

    Raises:
        UserError: if the recipe of a single run is not available.
    """
    columns = [(record.name, record.settings) for record in records if record.settings]
    if len(columns) == 1:
        columns.insert(0, (f"recipe {printable(str(columns[0][1].get('recipe')))}", recipe_settings(columns[0][1])))
    rows = [
        (
            printable(key),
            [Cell(format_setting(first)), *(Cell(format_setting(v), differs=v != first) for v in others)],
        )
        for key, (first, *others) in differing_settings([own for _, own in columns]).items()
    ]
    return Table(tuple(name for name, _ in columns), rows)


def recipe_settings(own: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's recipe, flat; those that depend on the model are filled in for the run's model.

    Args:
        own: the settings of the run.

    Raises:
        UserError: if the recipe or the model does not exist.
    """
    base = recipe(str(own.get("recipe")))
    for_model = fill_defaults(override(base, {"model": own.get("model", base.model.model)}, "config.yaml"))
    return {**to_plain(for_model), "model": base.model.model}


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """Return commands that reproduce a run, each with a heading."""
    if record.folder is None or not record.settings:
        return []
    start = ["accelerate", "launch", *_launch_flags(record.summary), "-m", "fastvit_train"]
    again = ["--exp-name", "again"]
    result = [("from its config.yaml", [*start, "--config", str(record.folder / "config.yaml"), *again])]
    try:
        base = recipe_settings(record.settings)
    except UserError:  # the table of settings shows the error
        return [(heading, printable(shlex.join(words))) for heading, words in result]
    changed = [
        word
        for key, value in record.settings.items()
        if key not in marked(Mark.RUN_NAME) and base.get(key) != value
        for word in _flag(key, value)
    ]
    result.append(("with flags", [*start, "--recipe", str(record.settings.get("recipe")), *changed, *again]))
    return [(heading, printable(shlex.join(words))) for heading, words in result]


def _launch_flags(summary: dict[str, Any]) -> list[str]:
    precision, processes = summary.get("mixed_precision", "no"), summary.get("world_size", 1)
    flags = [] if precision == "no" else ["--mixed_precision", str(precision)]
    if isinstance(processes, int) and processes > 1:
        flags += ["--multi_gpu", "--num_processes", str(processes)]
    return flags


def _flag(key: str, value: Any) -> list[str]:
    """Return the command line's words for a setting."""
    name = key.replace("_", "-")
    if isinstance(value, bool) and isinstance(DEFAULTS.get(key), bool):  # others take the word True or False
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def environment(record: RunRecord) -> list[tuple[str, str]]:
    """Return names and values of the run's hardware, launch and library versions."""
    versions = record.summary.get("versions")
    values = {key.replace("_", " "): record.summary.get(key) for key in ENVIRONMENT_KEYS}
    values |= versions if isinstance(versions, dict) else {}
    return [(printable(name), printable(str(v))[:MAX_TEXT_LENGTH]) for name, v in values.items() if v is not None]

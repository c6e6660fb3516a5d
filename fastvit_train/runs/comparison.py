"""Compare runs: a row per result, and a row per setting that differs."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastvit_train.config.overrides import marked
from fastvit_train.config.validation import Mark
from fastvit_train.runs.results import INVALID, MAX_TEXT_LENGTH, RunResults, is_finished
from fastvit_train.utils import markdown
from fastvit_train.utils.errors import UserError, did_you_mean, printable

MISSING = "—"


def _format_epochs(results: dict[str, Any]) -> str:
    done = f"{results['epochs']:d}"
    return done if is_finished(results) else f"{done} of {results['planned_epochs']:d}"


ENERGY_PER_IMAGE = "energy per image, mJ"
BALANCED, MAJORITY = "balanced accuracy", "always the most frequent class"
SUMMARY_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda s: s["model"],
    "data": lambda s: s["dataset"] if s["evaluated_on"] == "test" else f"{s['dataset']}, {s['evaluated_on']}",
    "recipe": lambda s: s["recipe"],
    "parameters": lambda s: f"{s['parameters']:,}",
    "model size, MB": lambda s: f"{s['model_size_mb']:.2f}",
    "epochs": _format_epochs,
    "train loss": lambda s: f"{s['train_loss']:.4f}",
    "test loss": lambda s: f"{s['test_loss']:.4f}",
    "accuracy": lambda s: f"{s['test_accuracy']:.2%}",
    BALANCED: lambda s: f"{s['balanced_test_accuracy']:.2%}",
    MAJORITY: lambda s: f"{s['majority_share']:.2%}",
    "highest accuracy": lambda s: f"{s['best_test_accuracy']:.2%}",
    "training time": lambda s: f"{s['train_seconds']:,.0f} s",
    "images/s": lambda s: f"{s['images_per_second']:,.0f}",
    ENERGY_PER_IMAGE: lambda s: f"{1e3 * s['energy_joules_per_image']:.3g}",
    "mixed precision": lambda s: s["mixed_precision"],
    "device": lambda s: s["device"],
}
"""rows of the comparison: the name of each, and a function that formats its value from a run's results"""
EVALUATION_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "balanced accuracy by eval": lambda e: f"{e['balanced_accuracy']:.2%} ± {100 * e['balanced_accuracy_error']:.2f}",
    "images of eval": lambda e: f"{e['images']:,} of {e['dataset']}",
}
"""the same for what `eval` wrote into the run's folder"""
OPTIONAL_ROWS = (BALANCED, MAJORITY, ENERGY_PER_IMAGE, *EVALUATION_ROWS)
"""rows that are shown if one of the runs has a value"""
SHOWN_SETTINGS = ("model", "dataset", "recipe")
"""settings that have a row among the results"""


def differing_settings(columns: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all `columns`: by name, the value in each column."""
    keys = dict.fromkeys(key for own in columns for key in own if key not in marked(Mark.RUN_NAME))
    values = {key: [own.get(key) for own in columns] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


def format_setting(value: Any) -> str:
    """Return a value of config.yaml as text."""
    return "not set" if value is None else printable(str(value))[:MAX_TEXT_LENGTH]


def _flag(setting: str) -> str:
    return f"--{printable(setting).replace('_', '-')}"


def comparison_rows(runs: Sequence[RunResults]) -> list[list[str]]:
    """Return a header with the runs' names, a row per result, and a row per setting that differs.

    Raises:
        UserError: if a value in a summary.json is missing or damaged.
    """
    head = ["", *(run.name for run in runs)]
    results = [[name, *(format_result(name, run) for run in runs)] for name in (*SUMMARY_ROWS, *EVALUATION_ROWS)]
    shown = [row for row in results if row[0] not in OPTIONAL_ROWS or set(row[1:]) != {MISSING}]
    return [head, *shown, *_setting_rows(runs)]


def select_rows(rows: list[list[str]], names: Sequence[str]) -> list[list[str]]:
    """Return the header of `rows` and those that are called `names`, in that order; all of them if `names` is empty.

    A setting is called without its dashes: `lr`. Of a result and a setting of one name, the result is returned.

    Raises:
        UserError: if no row has one of the names.
    """
    if not names:
        return rows
    head, *others = rows
    by_name = {row[0].removeprefix("--"): row for row in reversed(others)}  # a flag is not accepted as a value
    if unknown := [name for name in names if name not in by_name]:
        hint = did_you_mean(unknown[0], by_name)
        raise UserError(
            f"the comparison has no row {unknown[0]!r}{hint}; --rows allows: {', '.join(reversed(by_name))}"
        )
    return [head, *(by_name[name] for name in names)]


def format_result(name: str, run: RunResults) -> str:
    """Return the value of a row of SUMMARY_ROWS or EVALUATION_ROWS as text, or MISSING.

    Raises:
        UserError: if the run is finished, and its summary.json lacks the value or has a damaged one.
    """
    try:
        if name in EVALUATION_ROWS:
            return EVALUATION_ROWS[name](run.evaluation)
        return SUMMARY_ROWS[name](run.results)
    except INVALID as error:
        if not run.finished or name in OPTIONAL_ROWS:
            return MISSING
        raise UserError(
            f"a value is missing or damaged in the summary.json of {run.folder} ({error!r}); train that run again"
        ) from None


def _setting_rows(runs: Sequence[RunResults]) -> list[list[str]]:
    keys = differing_settings([run.settings for run in runs if run.settings])
    return [
        [
            _flag(key),
            *(format_setting(run.settings.get(key)) if run.settings else MISSING for run in runs),
        ]
        for key in keys
        if key not in SHOWN_SETTINGS
    ]


def dataset_names(runs: Sequence[RunResults]) -> str:
    """Return the names of the data sets that the runs were trained on, separated by commas."""
    return ", ".join(dict.fromkeys(run.results["dataset"] for run in runs))


def table(runs: Sequence[RunResults], rows: Sequence[str] = ()) -> Table:
    """Return the comparison as a table for the terminal; see `select_rows`."""
    head, *body = select_rows(comparison_rows(runs), rows)
    result = Table(*map(escape, head))
    for row in body:
        result.add_row(*map(escape, row), end_section=row[0] == [*SUMMARY_ROWS][-1])
    return result


def markdown_table(runs: Sequence[RunResults], rows: Sequence[str] = ()) -> str:
    """Return the comparison as a Markdown table; see `select_rows`."""
    return markdown.table([[markdown.text(cell) for cell in row] for row in select_rows(comparison_rows(runs), rows)])


def json_records(runs: Sequence[RunResults]) -> str:
    """Return a JSON list with an object per run: its name, results in full, and settings that differ.

    Values have the units of summary.json; one that is NaN, inf or not available is null.
    """
    keys = differing_settings([run.settings for run in runs if run.settings])
    records = [
        {
            "run": run.name,
            "folder": str(run.folder),
            "finished": run.finished,
            "results": run.results,
            "settings": {key: run.settings.get(key) for key in keys},
        }
        for run in runs
    ]
    finite = json.loads(json.dumps(records), parse_constant=lambda name: None)
    return json.dumps(finite, indent=2)


def csv_records(runs: Sequence[RunResults]) -> str:
    """Return CSV with a line per run: its name, the single values of its results, and settings that differ as --NAME.

    Values have the units of summary.json; one that is not available is empty.
    """
    records = []
    for record in json.loads(json_records(runs)):
        results, settings = record.pop("results"), record.pop("settings")
        single = {key: value for key, value in results.items() if not isinstance(value, dict | list)}
        records.append({**record, **single, **{f"--{key.replace('_', '-')}": value for key, value in settings.items()}})
    output = io.StringIO()
    writer = csv.DictWriter(
        output, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(records)
    return output.getvalue().rstrip("\n")


RECORDS = {"json": json_records, "csv": csv_records}
"""how to print a comparison for other programs, by the name of the flag"""

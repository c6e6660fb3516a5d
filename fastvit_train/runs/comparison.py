"""Compare the results of finished runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.utils import markdown
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.safe_load import read_json

TEXT_KEYS = ("model", "dataset", "evaluated_on", "recipe", "mixed_precision", "device")
MAX_TEXT_LENGTH = 200


def read_summary(run: Path) -> dict[str, Any]:
    """Return a finished run's summary.json with the train loss of its last epoch.

    Raises:
        UserError: if `run` is not the folder of a finished run.
    """
    try:
        summary = read_json(run / "summary.json")
        last_epoch = read_jsonl(RunFolder(run).metrics)[-1]
        return {
            "train_loss": last_epoch["train_loss"],
            **summary,
            **{key: _checked_text(summary[key]) for key in TEXT_KEYS},
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run} is not a finished run: its summary.json and metrics.jsonl cannot be read ({error!r}); "
            "give the folder of a finished run"
        ) from None


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.100} is not a string")
    return printable(text[:MAX_TEXT_LENGTH])


SUMMARY_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda s: s["model"],
    "data": lambda s: s["dataset"] if s["evaluated_on"] == "test" else f"{s['dataset']}, {s['evaluated_on']}",
    "recipe": lambda s: s["recipe"],
    "parameters": lambda s: f"{s['parameters']:,}",
    "model size, MB": lambda s: f"{s['model_size_mb']:.2f}",
    "epochs": lambda s: str(s["epochs"]),
    "train loss": lambda s: f"{s['train_loss']:.4f}",
    "test loss": lambda s: f"{s['test_loss']:.4f}",
    "accuracy": lambda s: f"{s['test_accuracy']:.2%}",
    "best epoch's accuracy": lambda s: f"{s['best_test_accuracy']:.2%}",
    "training time": lambda s: f"{s['train_seconds']:,.0f} s",
    "images/s": lambda s: f"{s['images_per_second']:,.0f}",
    "mixed precision": lambda s: s["mixed_precision"],
    "device": lambda s: s["device"],
}
"""rows of the comparison: the name of each, and a function that formats its value from a summary"""


def comparison_rows(runs: list[Path]) -> list[list[str]]:
    """Return a header with the runs' names, then a row per value of `SUMMARY_ROWS`.

    Raises:
        UserError: if one of `runs` is not the folder of a finished run.
    """
    summaries = [read_summary(run) for run in runs]
    head = ["", *(printable(run.resolve().name) for run in runs)]
    try:
        return [head, *([name, *(show(s) for s in summaries)] for name, show in SUMMARY_ROWS.items())]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"a value is missing or damaged in the summary.json of one of {', '.join(map(str, runs))} ({error!r}); "
            "train that run again"
        ) from None


def dataset_names(runs: list[Path]) -> str:
    """Return the names of the data sets that the runs were trained on, separated by commas."""
    return ", ".join(dict.fromkeys(read_summary(run)["dataset"] for run in runs))


def table(runs: list[Path]) -> Table:
    """Return the comparison as a table for the terminal."""
    head, *rows = comparison_rows(runs)
    result = Table(*map(escape, head))
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def markdown_table(runs: list[Path]) -> str:
    """Return the comparison as a Markdown table."""
    return markdown.table([[markdown.text(cell) for cell in row] for row in comparison_rows(runs)])

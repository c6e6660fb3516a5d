"""Finished runs, read back and put side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastvit_train.runs.run_folder import RunFolder, read_rows
from fastvit_train.utils import markdown as marked
from fastvit_train.utils.errors import UserError, printable
from fastvit_train.utils.safe_load import read_json

TEXTS = ("model", "dataset", "evaluated_on", "recipe", "mixed_precision", "device")
LONGEST_TEXT = 200


def read_summary(run: Path) -> dict[str, Any]:
    """A finished run's summary.json and the last line of its metrics, as one dict.

    Raises:
        UserError: where `run` is no folder of a finished run.
    """
    try:
        summary = read_json(run / "summary.json")
        last_epoch = read_rows(RunFolder(run).metrics)[-1]
        return {"train_loss": last_epoch["train_loss"], **summary, **{key: _short(summary[key]) for key in TEXTS}}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run} is not a finished run: its summary.json and metrics.jsonl can't be read ({error!r}); "
            "give the folder of a finished run"
        ) from None


def _short(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.100} is no text")
    return printable(text[:LONGEST_TEXT])


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
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


def figures(runs: list[Path]) -> list[list[str]]:
    """Finished runs side by side: a row of names, then a row per figure."""
    summaries = [read_summary(run) for run in runs]
    head = ["", *(printable(run.resolve().name) for run in runs)]
    try:
        return [head, *([name, *(show(s) for s in summaries)] for name, show in FIGURES.items())]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"a summary.json of {', '.join(map(str, runs))} lacks or garbles {error}; run it again"
        ) from None


def datasets(runs: list[Path]) -> str:
    """The names of the data sets that the runs were trained on."""
    return ", ".join(dict.fromkeys(read_summary(run)["dataset"] for run in runs))


def table(runs: list[Path]) -> Table:
    """`figures` for the terminal."""
    head, *rows = figures(runs)
    result = Table(*map(escape, head))
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def markdown(runs: list[Path]) -> str:
    """`figures` in Markdown."""
    return marked.table([[marked.text(cell) for cell in row] for row in figures(runs)])

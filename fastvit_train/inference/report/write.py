"""The verb `report`: runs on one page of HTML that needs nothing else, no network and no server."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastvit_train.inference.evaluate import EvaluatedRun, metrics
from fastvit_train.inference.report import charts, images, tables
from fastvit_train.inference.report.records import Record, attempt, read_records
from fastvit_train.runs.plots import MAX_LABELED_CLASSES
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError

MOST_PAIRS = 20
PRECISIONS = {"no": "fp32"}
"""what accelerate's names of mixed precisions stand for, where it isn't what they say"""


@dataclass(frozen=True)
class Tested:
    """What a model says of the test set now, ready for the page."""

    sentence: str
    """how it was evaluated, and what came of it"""
    differs: bool
    """the accuracy isn't the summary's"""
    classes: list[dict[str, Any]]
    """name, images, precision and recall of each; of many those with the lowest recall"""
    all_classes: int
    names: tuple[str, ...]
    confusion: list[list[int]]
    """rows true, columns predicted; empty where there are too many classes for a table"""
    pairs: list[tuple[str, str, int]]
    """the most frequent confusions: true, predicted, images"""
    mistakes: list[images.Mistake]
    no_mistakes: str
    """why there are none, or nothing"""
    looked: images.ImageMaps | None
    no_looks: str
    """why there are none, or nothing"""


def write_report(runs: Sequence[str], output: Path | None, data_dir: str | None = None) -> Path:
    """Write a page on trained models: figures, curves, settings, what they confuse and where they look.

    What isn't to be had, such as the data, is left out, and the page says why.

    Args:
        runs: as in `load_run`; at least one.
        output: where to; by default report.html in the first run's folder, or here where it has none.
        data_dir: where the data lies, if no longer where the runs found it.

    Returns:
        where the page is.

    Raises:
        UserError: where there is no such model, or the page can't be written.
    """
    if not runs:
        raise UserError("report takes one or more runs, as in: report runs/a runs/b")
    records = read_records(runs, data_dir)
    page = _page(records)
    path = output or (records[0].folder or Path()) / "report.html"
    with atomic_io.as_save_error(f"{path} can't be written; choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_atomically(path, page)
    return path


def _page(records: Sequence[Record]) -> str:
    folder = files("fastvit_train.inference.report")
    style, script, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html.jinja")
    )
    settings, no_settings = attempt(lambda: tables.settings(records))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        style=style,
        script=script,
        title=" and ".join(record.name for record in records[:2]) + (" and others" if len(records) > 2 else ""),
        runs=[(record, tables.result(record), _tested(record)) for record in records],
        verdict=tables.verdict(records),
        figures=tables.figures(records),
        charts=charts.charts(records),
        box=charts,
        settings=settings,
        no_settings=no_settings,
        commands=tables.commands,
        environment=tables.environment,
    )


def _tested(record: Record) -> Tested | None:
    evaluated = record.evaluated
    if evaluated is None:
        return None
    found, names = metrics(evaluated), images.class_names(evaluated)
    sentence, differs = _compared(found, record.summary)
    classes = found["classes"]
    many = len(names) > MAX_LABELED_CLASSES
    mistakes, no_mistakes = attempt(lambda: images.mistakes(evaluated))
    looked, no_looks = attempt(lambda: images.looks(evaluated))
    return Tested(
        sentence,
        differs,
        sorted(classes, key=lambda row: row["recall"] or 0)[:MOST_PAIRS] if many else classes,
        len(classes),
        names,
        [] if many else found["confusion"],
        _pairs(evaluated, names),
        mistakes or [],
        no_mistakes,
        looked,
        no_looks,
    )


def _compared(found: dict[str, Any], summary: dict[str, Any]) -> tuple[str, bool]:
    """How the model was evaluated for this page and what came of it; True where the summary has another accuracy."""
    precision = PRECISIONS.get(found["mixed_precision"], found["mixed_precision"])
    sentence = (
        f"Evaluated for this page on {found['dataset']} ({found['evaluated_on']}, {found['images']:,} images) in "
        f"{precision} on {found['device']}, attention {found['attention']}: {found['accuracy']:.2%}"
    )
    recorded = summary.get("test_accuracy")
    if not isinstance(recorded, int | float):
        return f"{sentence}.", False
    if abs(recorded - found["accuracy"]) * found["images"] < 0.5:
        return f"{sentence}, as in summary.json.", False
    then = PRECISIONS.get(summary["mixed_precision"], summary["mixed_precision"])
    return (
        f"{sentence}, where summary.json has {recorded:.2%}, computed in {then} on {summary['device']}: the precision, "
        "the machine, the libraries or the data are others."
    ), True


def _pairs(evaluated: EvaluatedRun, names: Sequence[str]) -> list[tuple[str, str, int]]:
    confusion = evaluated.evaluation.confusion().fill_diagonal_(0)
    counts, places = confusion.flatten().topk(min(MOST_PAIRS, confusion.numel()))
    return [
        (names[place // len(names)], names[place % len(names)], count)
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]

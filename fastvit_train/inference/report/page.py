"""Write a report on runs: one HTML page that needs no network and no server. The verb `report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fastvit_train.inference.evaluate import EvaluatedRun
from fastvit_train.inference.evaluation_output import metrics
from fastvit_train.inference.report import charts, images, tables
from fastvit_train.inference.report.records import RunRecord, load_records, value_or_error
from fastvit_train.runs import findings
from fastvit_train.runs.plots.figures import MAX_LABELED_CLASSES
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError, counted

MAX_ROWS = 20
"""maximum number of rows in a table of classes or of confusions"""
PRECISIONS = {"no": "fp32"}
"""how to show those of accelerate's mixed precisions that are not the name of a dtype"""


@dataclass(frozen=True)
class EvaluationView:
    """The evaluation of one run as the page shows it."""

    summary: str
    """accuracy and conditions of the evaluation, in a sentence"""
    accuracy_differs: bool
    """whether the accuracy differs from the one in summary.json"""
    classes: list[dict[str, Any]]
    """name, images, precision and recall of each class, or of those with the lowest recall if there are many"""
    num_classes: int
    """number of classes of the data set"""
    names: tuple[str, ...]
    """names of the model's outputs"""
    confusion: list[list[int]]
    """rows are true, columns predicted classes; empty if there are too many classes for a table"""
    confused_pairs: list[tuple[str, str, int]]
    """the most frequent confusions: true class, predicted class, number of images"""
    mistakes: list[images.Mistake]
    mistakes_error: str
    """the reason if the mistakes cannot be shown, otherwise empty"""
    attention: images.AttentionImages | None
    attention_error: str
    """the reason if `attention` is None, otherwise empty"""


def write_report(runs: Sequence[str], output: Path | None, data_dir: str | None = None) -> Path:
    """Write a page with results, curves, settings, confusion matrices, mistakes and attention maps of trained models.

    The page leaves out what is not available, such as the data set, and gives the reason.

    Args:
        runs: as in `load_run`; at least one.
        output: the file to write; by default report.html in the first run's folder, or in the current folder if the
            first model is not in a folder.
        data_dir: the folder that holds the data; by default the folder that the runs used.

    Returns:
        The path of the page.

    Raises:
        UserError: if a model is not available, or if the page cannot be written.
    """
    if not runs:
        raise UserError("report takes one or more runs, as in: report runs/a runs/b")
    records = load_records(runs, data_dir)
    page = render(records)
    path = output or (records[0].folder or Path()) / "report.html"
    with atomic_io.as_save_error(f"{path} cannot be written; choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_atomically(path, page)
    return path


def render(records: Sequence[RunRecord]) -> str:
    """Return the page about runs, one or more, as HTML."""
    folder = files("fastvit_train.inference.report")
    style, script, template = (
        (folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html.jinja")
    )
    settings, settings_error = value_or_error(lambda: tables.settings(records))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        style=style,
        script=script,
        title=" and ".join(record.name for record in records[:2]) + (" and others" if len(records) > 2 else ""),
        runs=[(record, tables.headline(record), _view(record)) for record in records],
        verdict=tables.verdict(records),
        warnings=lambda record: findings.warnings(record.summary, record.epochs),
        results=tables.results(records),
        charts=charts.charts(records),
        box=charts,
        settings=settings,
        settings_error=settings_error,
        commands=tables.commands,
        environment=tables.environment,
    )


def _view(record: RunRecord) -> EvaluationView | None:
    evaluated = record.evaluated
    if evaluated is None:
        return None
    values, names = metrics(evaluated), images.class_names(evaluated)
    summary, accuracy_differs = _summarize(values, record.summary)
    classes = values["classes"]
    many = len(names) > MAX_LABELED_CLASSES
    mistakes, mistakes_error = value_or_error(lambda: images.most_confident_mistakes(evaluated))
    attention, attention_error = value_or_error(lambda: images.attention_images(evaluated))
    return EvaluationView(
        summary,
        accuracy_differs,
        sorted(classes, key=lambda row: row["recall"] or 0)[:MAX_ROWS] if many else classes,
        len(classes),
        names,
        [] if many else values["confusion"],
        _most_confused_pairs(evaluated, names),
        mistakes or [],
        mistakes_error,
        attention,
        attention_error,
    )


def _summarize(values: dict[str, Any], summary: dict[str, Any]) -> tuple[str, bool]:
    """Return a sentence on the evaluation, and whether its accuracy differs from the one in summary.json."""
    precision = PRECISIONS.get(values["mixed_precision"], values["mixed_precision"])
    sentence = (
        f"Evaluated for this page on {values['dataset']} ({values['evaluated_on']}, "
        f"{counted(values['images'], 'image')}) with "
        f"attention {values['attention']} in {precision} on {values['device']}: accuracy {values['accuracy']:.2%}"
    )
    recorded = summary.get("test_accuracy")
    if not isinstance(recorded, int | float):
        return f"{sentence}.", False
    if abs(recorded - values["accuracy"]) * values["images"] < 0.5:
        return f"{sentence}, as in summary.json.", False
    precision = PRECISIONS.get(summary["mixed_precision"], summary["mixed_precision"])
    return (
        f"{sentence}, but summary.json has {recorded:.2%}, computed in {precision} on {summary['device']}. The "
        "precision, the machine, the library versions or the data are different."
    ), True


def _most_confused_pairs(evaluated: EvaluatedRun, names: Sequence[str]) -> list[tuple[str, str, int]]:
    confusion = evaluated.evaluation.confusion().fill_diagonal_(0)
    counts, indices = confusion.flatten().topk(min(MAX_ROWS, confusion.numel()))
    return [
        (names[index // len(names)], names[index % len(names)], count)
        for count, index in zip(counts.tolist(), indices.tolist(), strict=True)
        if count
    ]

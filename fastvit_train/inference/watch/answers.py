"""What the server answers: the files of the page, and the runs as JSON or as a report. Nothing is written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from fastvit_train.inference.watch.curves import read_curves
from fastvit_train.inference.watch.listing import COLUMNS, ListedRun, RunList
from fastvit_train.runs.comparison import SUMMARY_ROWS, comparison_rows
from fastvit_train.runs.results import read_runs
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils.errors import UserError, printable

HTML, JSON, TEXT = "text/html", "application/json", "text/plain"
SAME_ORIGIN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# A report may be from anybody, and has its script inside: the sandbox keeps that script out of this server's pages.
SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_COMPARED = 12
"""runs in one comparison"""


@dataclass(frozen=True)
class Answer:
    """The content of an answer, and how the browser is to take it."""

    content: bytes
    type: str
    policy: str = SAME_ORIGIN
    """the Content-Security-Policy"""


def _runs(runs: RunList, ids: list[str]) -> Answer:
    """The list, and the names of its columns."""
    rows = [run.as_json() for run in runs.read()]
    return _json({"root": printable(str(runs.root)), "columns": COLUMNS, "runs": rows})


def _curves(runs: RunList, ids: list[str]) -> Answer:
    """The curves of one run, as `read_curves` returns them."""
    (run,) = _undamaged(runs.find(ids), "has no curves", 1)
    return _json(read_curves(RunFolder(run.folder)))


def _comparison(runs: RunList, ids: list[str]) -> Answer:
    """The rows that `compare` prints, and how many of them are results: the others are settings that differ."""
    listed = _undamaged(runs.find(ids), "can't be compared", MAX_COMPARED)
    results = read_runs([run.folder for run in listed])
    named = [replace(result, name=run.name) for result, run in zip(results, listed, strict=True)]
    head, *rows = comparison_rows(named)
    return _json({"head": head, "rows": rows, "results": sum(row[0] in SUMMARY_ROWS for row in rows)})


def _report(runs: RunList, ids: list[str]) -> Answer:
    """The report in the run's folder or, if there is none that is current, one without an evaluation."""
    (run,) = _undamaged(runs.find(ids), "has no report", 1)
    written = runs.report(run)
    return Answer(_render_report(run) if written is None else written.read_bytes(), HTML, SANDBOX)


def _render_report(run: ListedRun) -> bytes:
    from fastvit_train.inference.report.page import render  # here, since few who watch runs open one
    from fastvit_train.inference.report.records import load_records

    return render(load_records([str(run.folder)], None, evaluate=False)).encode(errors="backslashreplace")


def _undamaged(runs: Sequence[ListedRun], what: str, most: int) -> Sequence[ListedRun]:
    """Return `runs`; UserError if one of them is damaged, or if there are none or more than `most`."""
    if not 1 <= len(runs) <= most:
        raise UserError(f"{len(runs)} runs can't be shown together here; allowed: 1 to {most}")
    for run in runs:
        if run.state == "damaged":
            raise UserError(f"{run.name} {what}: {run.note}")
    return runs


def _json(content: Any) -> Answer:
    return Answer(json.dumps(content, allow_nan=False).encode(), JSON)


PAGE = {
    "/": ("watch", "watch.html", HTML),
    "/watch.css": ("watch", "watch.css", "text/css"),
    "/watch.js": ("watch", "watch.js", "text/javascript"),
    "/list.js": ("watch", "list.js", "text/javascript"),
    "/chart.js": ("watch", "chart.js", "text/javascript"),
    "/report.css": ("report", "report.css", "text/css"),
}
"""the files of the page by path: the package that holds each, its name and its type"""
ANSWERS: dict[str, Callable[[RunList, list[str]], Answer]] = {
    "/api/runs": _runs,
    "/api/curves": _curves,
    "/api/comparison": _comparison,
    "/report": _report,
}
"""what is computed, by path"""


def answer(path: str, runs: RunList, ids: list[str]) -> Answer:
    """Answer a request.

    Args:
        path: the path of the request. It is looked up in a table, and never used as the path of a file.
        runs: the runs.
        ids: the runs that the request is about.

    Raises:
        FileNotFoundError: if there is nothing at that path, or no run with one of the ids.
        UserError: if a run can't be shown in that way.
        OSError: if a file can't be read.
    """
    if path in PAGE:
        package, name, kind = PAGE[path]
        return Answer((files(f"fastvit_train.inference.{package}") / name).read_bytes(), kind)
    if path in ANSWERS:
        return ANSWERS[path](runs, ids)
    raise FileNotFoundError(path)

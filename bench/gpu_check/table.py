"""The tables that end the check: what each part measured, and which goals were met."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import tables
from bench.gpu_check.goals import GOALS, Results
from bench.gpu_check.parts import describe_status

WIDTH = 150


def show(results: Results) -> None:
    """Print the tables."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    for result in results.values():
        if rows := result.get("rows"):
            console.print(tables.table(rows))
    console.print(parts_table(results))
    console.print(goals_table(results))


def parts_table(results: Results) -> Table:
    """Return a table of what was measured outside of `python -m bench`, and of what failed."""
    table = Table("part", "seconds", "result", title="All parts", title_justify="left")
    for name, result in results.items():
        table.add_row(name, f"{result['seconds']:.0f}", "\n".join(describe(result)))
    return table


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for a part."""
    if result["exit_status"]:
        yield describe_status(result["exit_status"])
    if "summary" in result:
        yield result["summary"]
    if rows := result.get("rows"):
        fastest = max(rows, key=lambda row: row["images_per_second"])
        yield f"fastest: {fastest['name']}"
    for row in result.get("failed", []):
        yield f"{row['name']} failed: {row['error'].strip().splitlines()[-1]}"
    for run in result.get("runs", []):
        if epochs := run["epochs"]:
            accuracy, seconds = epochs[-1]["accuracy"], epochs[-1]["seconds"]
            yield f"{run['name']}: {accuracy:.2%} after {len(epochs)} epochs, {seconds:,.1f} s"


def goals_table(results: Results) -> Table:
    """Return a table of the goals, with the value and the verdict of each."""
    devices = dict.fromkeys(result["environment"]["device"] for result in results.values())
    title = f"Goals, set for one H100; measured on {' and '.join(devices) or 'nothing'}"
    table = Table("", "goal", "measured", "", title=title, title_justify="left")
    for goal in GOALS:
        value = goal.value(results)
        measured = "" if value is None else goal.format.format(value)
        table.add_row(goal.metric, f"{goal.sign} {goal.format.format(goal.bound)}", measured, goal.verdict(value))
    return table

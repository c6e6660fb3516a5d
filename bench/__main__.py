"""`python -m bench`: the main comparison in turn, as a table and as pictures; `--compare` tells what moved."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from bench import (
    bench_attention,
    bench_epoch,
    bench_inference,
    bench_input,
    bench_scaling,
    bench_step,
    bench_telemetry,
    compare,
    plots,
    turns,
)
from bench.case import Case, device, many_compiled_at_once, prepare_process
from bench.environment import ROOT, environment
from bench.measure import by_group
from fastvit_train.utils.atomic_io import write_atomically
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import quartiles

SUITES = (bench_epoch, bench_step, bench_input, bench_attention, bench_inference, bench_scaling, bench_telemetry)
MAIN = (
    bench_epoch.WHAT,
    f"{bench_step.WHAT}, c_vit",
    f"{bench_step.WHAT}, mc_vit",
    bench_input.WHAT,
    bench_scaling.WITH_BATCH,
    bench_scaling.WITH_TOKENS,
)


@dataclass(frozen=True)
class Arguments:
    """Measure rows in turn and write them, with pictures, to a folder; or compare two such results."""

    only: tuple[str, ...] = MAIN
    """rows whose name begins with one of these; "" is all of them"""
    output: Path | None = None
    """folder for bench.json, table.md and the pictures; bench/results/cpu or /gpu by default"""
    seconds: float = 2.0
    """to time each row for, about"""
    list: bool = False
    """print the rows' names and stop"""
    compare: tuple[Path, Path] | None = None
    """two bench.json: print which rows moved by more than the noise; exit status 1 if one became slower"""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bench")
    try:
        if arguments.compare is not None:
            sys.exit(show_changes(*arguments.compare))
        groups = select(arguments.only)
        if arguments.list:
            print("\n".join(case.id for cases in groups.values() for case in cases))
            return
        with many_compiled_at_once():
            run(groups, arguments)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        sys.exit(2)


def select(only: tuple[str, ...]) -> dict[str, list[Case]]:
    """The cases that can run here and whose names begin with one of `only`, by group."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in (case for suite in SUITES for case in suite.cases()):
        if case.unavailable is None and case.id.startswith(only):
            groups[case.group].append(case)
    if not groups:
        raise UserError(f"no row begins with {' or '.join(map(repr, only))}; --only '' --list prints them")
    return groups


def run(groups: dict[str, list[Case]], arguments: Arguments) -> None:
    """Measure, print a table per group as it is done, and write everything."""
    folder = arguments.output or ROOT / "bench" / "results" / ("gpu" if device().type == "cuda" else "cpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror}); choose another --output") from None
    prepare_process()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    facts = environment()
    console.print(words(facts), soft_wrap=True)
    rows: list[dict[str, Any]] = []
    for results, controls in turns.measure(groups, arguments.seconds, console):
        rows += results
        console.print(table(results))
        document = {"environment": facts, "controls": controls, "rows": rows}
        write_atomically(folder / "bench.json", json.dumps(document, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(rows, facts))
    for path in (folder / "bench.json", folder / "table.md", *plots.draw(rows, facts, folder)):
        console.print(f"written to {path}", soft_wrap=True)


def words(facts: dict[str, Any]) -> str:
    """The environment in a line."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


HEAD = ("", "ms", "quartiles", "images/s", "of the first's", "MFU", "MiB", "first call, s")


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A group's rows as the tables show them."""
    return [
        (
            row["name"],
            *_milliseconds(row["seconds"]),
            f"{row['images_per_second']:,.0f}",
            f"{row['images_per_second'] / rows[0]['images_per_second']:.2f}x",
            "" if row["mfu"] is None else f"{row['mfu']:.0%}",
            _memory(row),
            f"{row['first_call_seconds']:.1f}",
        )
        for row in rows
    ]


def _milliseconds(seconds: list[float]) -> tuple[str, str]:
    low, median, high = (value * 1e3 for value in quartiles(seconds))
    return f"{median:,.1f}", f"{low:,.1f} to {high:,.1f}"


def _memory(row: dict[str, Any]) -> str:
    keys = ["peak_memory_mib", "saved_for_backward_mib"]
    keys += ["peak_rss_mib"] if row["what"] == bench_epoch.WHAT else []
    return next((f"{row[key]:,.0f}" for key in keys if row.get(key) is not None), "")


def table(rows: list[dict[str, Any]]) -> Table:
    """A group for the terminal."""
    result = Table(*HEAD, title=rows[0]["group"], title_justify="left", min_width=100)
    for row in cells(rows):
        result.add_row(*row)
    return result


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """All groups in Markdown."""
    lines = [words(facts)]
    for own in by_group(rows):
        lines += ["", f"**{own[0]['group']}**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *cells(own))]
    return "\n".join(lines) + "\n"


def show_changes(before: Path, after: Path) -> int:
    """Print what moved between two results; returns the exit status."""
    results = compare.read(before), compare.read(after)
    found = compare.changes(*results)
    console = Console(highlight=False)
    if any(change.verdict != "unchanged" for change in found):
        console.print(compare.table(found))
    console.print(compare.summary(*results, found), soft_wrap=True)
    return int(any(change.verdict == "slower" for change in found))


if __name__ == "__main__":
    main()

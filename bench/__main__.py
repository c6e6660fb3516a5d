"""`python -m bench`: measure the main comparison, interleaved, as a table and plots; `--compare` compares results."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from bench import compare, interleaved, plots
from bench.benchmark_case import BenchmarkCase, device, prepare_process
from bench.environment import ROOT, environment
from bench.measure import by_group
from bench.suites import (
    bench_attention,
    bench_epoch,
    bench_inference,
    bench_input,
    bench_scaling,
    bench_step,
    bench_telemetry,
)
from fastvit_kernels.torch_private import specialize_each_shape
from fastvit_train.utils.atomic_io import write_atomically
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import quartiles

SUITES = (bench_epoch, bench_step, bench_input, bench_attention, bench_inference, bench_scaling, bench_telemetry)


@dataclass(frozen=True)
class Arguments:
    """Measure rows, interleaved, and write them with plots to a folder; or compare two such results."""

    only: tuple[str, ...] = ()
    """measure the rows whose names begin with one of these, "" for all; by default the main comparison"""
    output: Path | None = None
    """folder for bench.json, table.md and the plots; bench/results/cpu or /gpu by default"""
    seconds: float = 2.0
    """approximate time to spend on each row"""
    list: bool = False
    """print the names of the rows and exit"""
    compare: tuple[Path, Path] | None = None
    """two bench.json files: print the rows that changed by more than the noise; exit status 1 if one became slower"""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m bench")
    try:
        if arguments.compare is not None:
            sys.exit(show_changes(*arguments.compare))
        groups = select(arguments.only)
        if arguments.list:
            print("\n".join(case.id for cases in groups.values() for case in cases))
            return
        with specialize_each_shape():
            run(groups, arguments)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        sys.exit(2)


def select(only: tuple[str, ...]) -> dict[str, list[BenchmarkCase]]:
    """Return the cases that can run here, by group: those whose names begin with one of `only`, or the main ones."""
    groups: dict[str, list[BenchmarkCase]] = defaultdict(list)
    for case in (case for suite in SUITES for case in suite.cases()):
        selected = case.id.startswith(only) if only else case.main
        if selected and case.why_unavailable is None:
            groups[case.group].append(case)
    if not groups:
        raise UserError(f"no row begins with {' or '.join(map(repr, only))}; --only '' --list prints all names")
    return groups


def run(groups: dict[str, list[BenchmarkCase]], arguments: Arguments) -> None:
    """Measure the groups, print a table after each, and write all results."""
    folder = arguments.output or ROOT / "bench" / "results" / ("gpu" if device().type == "cuda" else "cpu")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another --output") from None
    prepare_process()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    facts = environment()
    console.print(one_line(facts), soft_wrap=True)
    rows: list[dict[str, Any]] = []
    for results, controls in interleaved.measure(groups, arguments.seconds, console):
        rows += results
        console.print(table(results))
        document = {"environment": facts, "controls": controls, "rows": rows}
        write_atomically(folder / "bench.json", json.dumps(document, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(rows, facts), encoding="utf-8")
    for path in (folder / "bench.json", folder / "table.md", *plots.draw(rows, facts, folder)):
        console.print(f"written to {path}", soft_wrap=True)


def one_line(facts: dict[str, Any]) -> str:
    """Return the environment in one line."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


HEAD = ("", "ms", "quartiles", "images/s", "speedup", "MFU", "MiB", "first call, s")


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a group's rows as the tables show them."""
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
    keys += ["peak_rss_mib"] if row["operation"] == bench_epoch.OPERATION else []
    return next((f"{row[key]:,.0f}" for key in keys if row.get(key) is not None), "")


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of a group for the terminal."""
    result = Table(*HEAD, title=rows[0]["group"], title_justify="left", min_width=100)
    for row in cells(rows):
        result.add_row(*row)
    return result


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return all groups in Markdown."""
    lines = [one_line(facts)]
    for group in by_group(rows):
        lines += ["", f"**{group[0]['group']}**", ""]
        lines += [f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *cells(group))]
    return "\n".join(lines) + "\n"


def show_changes(before: Path, after: Path) -> int:
    """Print the changes between two results; return the exit status."""
    results = compare.read(before), compare.read(after)
    changes = compare.changes(*results)
    console = Console(highlight=False)
    if any(change.verdict != "unchanged" for change in changes):
        console.print(compare.table(changes))
    console.print(compare.summary(*results, changes), soft_wrap=True)
    return int(any(change.verdict == "slower" for change in changes))


if __name__ == "__main__":
    main()

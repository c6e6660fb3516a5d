"""`python -m bench`: measure the main comparison, interleaved, as a table and plots; `--compare` compares results."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from bench import compare, interleaved, plots, tables
from bench.benchmark_case import BenchmarkCase, device, prepare_process
from bench.environment import ROOT, environment
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
            complete = run(groups, arguments)
        if not complete:
            sys.exit(1)
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


def run(groups: dict[str, list[BenchmarkCase]], arguments: Arguments) -> bool:
    """Measure the groups, print a table after each, and write all results; return whether no row failed."""
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
    console.print(tables.one_line(facts), soft_wrap=True)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for results, failures, controls in interleaved.measure(groups, arguments.seconds, console):
        rows += results
        failed += failures
        if results:
            console.print(tables.table(results))
        document = {"environment": facts, "controls": controls, "rows": rows, "failed": failed}
        write_atomically(folder / "bench.json", json.dumps(document, indent=1) + "\n")
    (folder / "table.md").write_text(tables.markdown(rows, facts), encoding="utf-8")
    for path in (folder / "bench.json", folder / "table.md", *plots.draw(rows, facts, folder)):
        console.print(f"written to {path}", soft_wrap=True)
    return not failed


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

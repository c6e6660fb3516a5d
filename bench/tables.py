"""The results of `python -m bench` as tables, for the terminal and in Markdown."""

import math
from typing import Any

from rich.table import Table

from bench.measure import by_group
from bench.suites import bench_epoch
from fastvit_train.utils.timing import quartiles


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
    low, median, high = (significant(value * 1e3) for value in quartiles(seconds))
    return median, f"{low} to {high}"


def significant(value: float) -> str:
    """Return a positive value with three significant digits, or more before the decimal point: 1,234, 0.0123."""
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


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

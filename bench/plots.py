"""Plots of a result of `python -m bench`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from bench.suites.bench_scaling import WITH_BATCH, WITH_TOKENS, WITH_WIDTH
from bench.suites.bench_step import OPERATION as STEP

COLORS = {"fp32": "#4477aa", "bf16": "#cc6677"}
MARKS = {"naive": ":", "fused": "-", "sdpa": "--", "cpp": "-.", "triton": "-."}
MEMORY = {
    "peak_memory_mib": "memory of a step, MiB (CUDA's count)",
    "saved_for_backward_mib": "kept for the backward pass, MiB",
}

Rows = list[dict[str, Any]]


def draw(rows: Rows, environment: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that `rows` have data for to `folder`, and return their paths."""
    steps = [row for row in rows if row["operation"] == STEP]
    scaling = [row for row in rows if row["operation"] in (WITH_BATCH, WITH_TOKENS, WITH_WIDTH)]
    memory = next((key for key in MEMORY if any(row.get(key) is not None for row in steps)), None)
    written = []
    if steps:
        written.append(bars(steps, "images_per_second", "images/s", environment, folder / "throughput.png"))
    if steps and memory:
        written.append(bars(steps, memory, MEMORY[memory], environment, folder / "memory.png"))
    if scaling:
        written.append(lines(scaling, environment, folder / "scaling.png"))
    return written


def bars(rows: Rows, figure: str, label: str, environment: dict[str, Any], path: Path) -> Path:
    """Plot a panel per shape, with a bar per row and dtype."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    picture, panels = plt.subplots(
        1, len(shapes), figsize=(1 + 4.5 * len(shapes), 1 + 0.42 * len(names)), squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        for offset, (dtype, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
            values = {row["name"]: row[figure] for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)}
            places = [names.index(name) + offset for name in values]
            drawn = panel.barh(places, list(values.values()), 0.38, color=color)
            panel.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        panel.set_yticks(range(len(names)), names if panel is panels[0][0] else [""] * len(names))
        panel.set(title=shape, xlabel=label)
        panel.invert_yaxis()
        panel.margins(x=0.18)
    dtypes = {row["dtype"] for row in rows}
    patches = [Patch(color=color, label=dtype) for dtype, color in COLORS.items() if dtype in dtypes]
    picture.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 0.05), ncols=2)
    return _save(picture, environment, path)


def lines(rows: Rows, environment: dict[str, Any], path: Path) -> Path:
    """Plot microseconds per image over batch, tokens or width, with a line per implementation and dtype."""
    kinds = list(dict.fromkeys(row["operation"] for row in rows))
    picture, panels = plt.subplots(1, len(kinds), figsize=(1 + 4.5 * len(kinds), 4.2), squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        own = [row for row in rows if row["operation"] == kind]
        panel.set(title=kind, xscale="log", yscale="log", ylabel="µs per image")
        for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in own):
            _line(panel, [row for row in own if (row["shape"], row["dtype"]) == (shape, dtype)])
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize=8)
    return _save(picture, environment, path)


def _line(panel: Axes, rows: Rows) -> None:
    sizes = [int(row["name"][1:]) for row in rows]
    implementation = rows[0]["shape"].split()[-2]
    panel.plot(
        sizes,
        [1e6 / row["images_per_second"] for row in rows],
        MARKS[implementation],
        color=COLORS[rows[0]["dtype"]],
        marker="o",
        label=f"{implementation}, {rows[0]['dtype']}",
    )
    panel.set_xticks(sizes, [row["name"] for row in rows])
    panel.xaxis.set_minor_locator(NullLocator())


def _save(picture: Any, environment: dict[str, Any], path: Path) -> Path:
    caption = f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}"
    picture.text(0.01, 0.015, caption, fontsize=7, color="gray")
    picture.tight_layout(rect=(0, 0.12, 1, 1))
    picture.savefig(path, dpi=120)
    plt.close(picture)
    return path

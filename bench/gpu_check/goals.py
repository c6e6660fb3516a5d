"""The goals for one H100, and the values that the parts of the check measured for them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

Results = dict[str, dict[str, Any]]
"""for each part that ran its result in results.json"""
Value = Callable[[Results], float | None]
"""returns a value, or None if it was not measured"""
SPEED = "images_per_second"


@dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        metric: what is measured.
        sign: whether the value should be at least ("≥") or at most ("≤") the bound.
        bound: the bound, in the unit of the value.
        format: format string for the value and the bound, with the unit.
        value: returns the value from the results.
    """

    metric: str
    sign: str
    bound: float
    format: str
    value: Value

    def verdict(self, value: float | None) -> str:
        """Return "met", "missed" or "not measured"."""
        if value is None:
            return "not measured"
        met = value >= self.bound if self.sign == "≥" else value <= self.bound
        return "met" if met else "missed"


def rows_of(results: Results, part: str, *implementations: str) -> list[dict[str, Any]]:
    """Return the rows of a part, those of some implementations or all; a row with a CUDA graph is one of them."""
    rows = results.get(part, {}).get("rows", [])
    return [row for row in rows if not implementations or row["name"].partition(",")[0] in implementations]


def best(part: str, key: str, *implementations: str) -> Value:
    """The highest value of these rows."""

    def value(results: Results) -> float | None:
        rows = rows_of(results, part, *implementations)
        return max((row[key] for row in rows if row[key] is not None), default=None)

    return value


def ratio(ours: Value, theirs: Value) -> Value:
    """The ratio of two values."""

    def value(results: Results) -> float | None:
        numerator, denominator = ours(results), theirs(results)
        return numerator / denominator if numerator and denominator else None

    return value


def microseconds(part: str, batch: int) -> Value:
    """The time of a call of our kernel on `batch` images."""
    return ratio(lambda _: batch * 1e6, best(part, SPEED, "triton"))


def over_sdpa(part: str) -> Value:
    """The speed of our kernel over that of torch's products around scaled_dot_product_attention."""
    return ratio(best(part, SPEED, "triton"), best(part, SPEED, "sdpa"))


def peak_memory(part: str, implementation: str) -> Value:
    """The memory of a call in MiB, without a CUDA graph."""

    def value(results: Results) -> float | None:
        rows = rows_of(results, part, implementation)
        return next((row.get("peak_memory_mib") for row in rows if row["name"] == implementation), None)

    return value


def seconds_to(part: str, accuracy: float) -> Value:
    """The mean seconds until the runs of a part reached an accuracy; infinite if a run ended below it."""

    def value(results: Results) -> float | None:
        runs = results.get(part, {}).get("runs", [])
        reached = [
            next((epoch["seconds"] for epoch in run["epochs"] if epoch["accuracy"] >= accuracy), math.inf)
            for run in runs
        ]
        if not runs or (math.inf in reached and results[part]["exit_status"] != 0):
            return None
        return mean(reached)

    return value


NARROW, WIDE = "B4096 N64 D48", "B1024 N256 D256"
TIMES, MICROSECONDS, SECONDS, IMAGES = "{:.2f}x", "{:,.1f} µs", "{:,.1f} s", "{:,.0f} img/s"
GOALS = (
    Goal(f"attention forward, {NARROW}, over SDPA", "≥", 3, TIMES, over_sdpa("attention-narrow-forward")),
    Goal(f"attention forward, {NARROW}", "≤", 45, MICROSECONDS, microseconds("attention-narrow-forward", 4096)),
    Goal(f"attention forward+backward, {NARROW}, over SDPA", "≥", 2, TIMES, over_sdpa("attention-narrow")),
    Goal(f"attention forward+backward, {NARROW}", "≤", 130, MICROSECONDS, microseconds("attention-narrow", 4096)),
    Goal(
        f"attention forward+backward, {NARROW}, peak memory over SDPA's",
        "≤",
        0.5,
        TIMES,
        ratio(peak_memory("attention-narrow", "triton"), peak_memory("attention-narrow", "sdpa")),
    ),
    Goal(f"attention forward, {WIDE}, over SDPA", "≥", 1, TIMES, over_sdpa("attention-wide-forward")),
    Goal(f"attention forward+backward, {WIDE}, over SDPA", "≥", 1, TIMES, over_sdpa("attention-wide")),
    Goal("mc-ViT training step, batch 256", "≥", 500_000, IMAGES, best("step-256", SPEED)),
    Goal("mc-ViT training step, batch 4096", "≥", 1_500_000, IMAGES, best("step-4096", SPEED)),
    Goal(
        "mc-ViT epochs, batch 256, over the typical script",
        "≥",
        10,
        TIMES,
        ratio(best("epochs", SPEED, "fastvit_train"), best("epochs", SPEED, "typical script")),
    ),
    Goal("CVT-7/4 training step, MFU", "≥", 0.35, "{:.0%}", best("step-cvt", "mfu")),
    Goal("CCT-7/3x1 training step, MFU", "≥", 0.35, "{:.0%}", best("step-cct", "mfu")),
    Goal("mc-ViT to 77.25% on CIFAR-10", "≤", 1, SECONDS, seconds_to("accuracy", 0.7725)),
    Goal("CVT-7/4 to 92.43% on CIFAR-10", "≤", 60, SECONDS, seconds_to("cvt", 0.9243)),
    Goal("CVT-7/4 to 94% on CIFAR-10", "≤", 30, SECONDS, seconds_to("cvt", 0.94)),
)

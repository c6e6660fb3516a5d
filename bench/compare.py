"""Two results of `python -m bench`: which rows moved by more than the noise.

A median's own uncertainty is 1.58 interquartile ranges over the root of the number of rounds (McGill, Tukey and Larsen
1978: about 95% for the difference of two medians), here taken one and a half times. On top comes what the controls,
which no commit changes, moved by between the two runs: the machine's share; and 2% for what neither tells.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import quartiles

NOTCH = 1.58 * 1.5
FLOOR = 0.02


@dataclass(frozen=True)
class Change:
    """One row's time in the second run over that in the first, and the factor that noise alone may make."""

    id: str
    before: float
    """seconds"""
    after: float
    noise: float
    """a factor, 1.1 for 10%"""

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.ratio > self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / self.noise else "unchanged"


def read(path: Path) -> dict[str, Any]:
    """A result's environment, and the seconds of its rows and controls by name; UserError where `path` holds none."""
    try:
        result = json.loads(path.read_text())
        controls = {control["name"]: control["seconds"] for control in result["controls"]}
        facts = {key: result["environment"][key] for key in ("device", "commit")}
        rows = {row["id"]: row["seconds"] for row in result["rows"]}
        return {"environment": facts, "controls": controls, "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of `python -m bench` ({error!r})") from None


def uncertainty(seconds: list[float]) -> float:
    """Relative half-width of the interval in which a row's median lies."""
    low, median, high = quartiles(seconds)
    return NOTCH * (high - low) / median / math.sqrt(len(seconds))


def machine_shift(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The most that a control moved by between two results, as a natural logarithm.

    Raises:
        UserError: where they have no control in common.
    """
    old, new = before["controls"], after["controls"]
    medians = [(quartiles(old[name])[1], quartiles(new[name])[1]) for name in old if name in new]
    if not medians:
        raise UserError("the two results were measured with different controls; measure the older one again")
    return max(abs(math.log(later / earlier)) for earlier, later in medians)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every row that both results have.

    Raises:
        UserError: where they were measured on different devices, or share no row.
    """
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        raise UserError(f"results of different devices can't be compared: {devices[0]} and {devices[1]}")
    shift = machine_shift(before, after)
    found = []
    for name, old in before["rows"].items():
        new = after["rows"].get(name)
        if new is not None:
            own = uncertainty(old) + uncertainty(new)
            noise = math.exp(own + shift + FLOOR)
            found.append(Change(name, quartiles(old)[1], quartiles(new)[1], noise))
    if not found:
        raise UserError("the two results have no row in common")
    return found


def table(found: list[Change]) -> Table:
    """The rows that moved, with the noise that they were held against."""
    result = Table("row", "before, ms", "after, ms", "change", "noise", "")
    for change in sorted(found, key=lambda change: change.ratio):
        if change.verdict != "unchanged":
            result.add_row(
                change.id,
                f"{change.before * 1e3:,.2f}",
                f"{change.after * 1e3:,.2f}",
                f"{change.ratio - 1:+.0%}",
                f"±{change.noise - 1:.0%}",
                change.verdict,
            )
    return result


def summary(before: dict[str, Any], after: dict[str, Any], found: list[Change]) -> str:
    """How many rows moved, and what the noise is made of, in one line."""
    verdicts = [change.verdict for change in found]
    noises = sorted(change.noise - 1 for change in found)
    return (
        f"{verdicts.count('unchanged')} rows unchanged, {verdicts.count('slower')} slower, "
        f"{verdicts.count('faster')} faster; commits {before['environment']['commit']} and "
        f"{after['environment']['commit']}; noise ±{noises[0]:.0%} to ±{noises[-1]:.0%}: the medians' own uncertainty, "
        f"{machine_shift(before, after):.1%} that the controls moved by, and {FLOOR:.0%}"
    )

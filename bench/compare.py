"""Compare two results of `python -m bench`: which rows changed by more than the noise.

The uncertainty of a median is 1.58 interquartile ranges over the root of the number of rounds (McGill, Tukey and Larsen
1978: about 95% for the difference of two medians); we use 1.5 times that. The noise also includes the change of the
controls, which no commit changes, between the two runs, and a floor of 2%.
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
    """A row's median times in both runs, and the factor by which noise alone may change them."""

    id: str
    before: float
    """median seconds in the first run"""
    after: float
    """median seconds in the second run"""
    noise: float
    """the largest factor that noise explains, 1.1 for 10%"""

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.ratio > self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / self.noise else "unchanged"


def read(path: Path) -> dict[str, Any]:
    """Read a result: its environment, and the seconds of its rows and controls by name.

    Raises:
        UserError: if `path` is not a result of `python -m bench`.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        controls = {control["name"]: control["seconds"] for control in result["controls"]}
        facts = {key: result["environment"][key] for key in ("device", "commit")}
        rows = {row["id"]: row["seconds"] for row in result["rows"]}
        return {"environment": facts, "controls": controls, "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of `python -m bench` ({error!r})") from None


def uncertainty(seconds: list[float]) -> float:
    """Return the relative half-width of the interval in which a row's median lies."""
    low, median, high = quartiles(seconds)
    return NOTCH * (high - low) / median / math.sqrt(len(seconds))


def machine_shift(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return the largest change of a control between two results, as a natural logarithm.

    Raises:
        UserError: if they have no control in common.
    """
    old, new = before["controls"], after["controls"]
    medians = [(quartiles(old[name])[1], quartiles(new[name])[1]) for name in old if name in new]
    if not medians:
        raise UserError("the two results were measured with different controls; measure the older one again")
    return max(abs(math.log(later / earlier)) for earlier, later in medians)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Compare every row that both results have.

    Raises:
        UserError: if they were measured on different devices, or have no row in common.
    """
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        raise UserError(f"results of different devices cannot be compared: {devices[0]} and {devices[1]}")
    shift = machine_shift(before, after)
    result = []
    for name, old in before["rows"].items():
        new = after["rows"].get(name)
        if new is not None:
            own = uncertainty(old) + uncertainty(new)
            noise = math.exp(own + shift + FLOOR)
            result.append(Change(name, quartiles(old)[1], quartiles(new)[1], noise))
    if not result:
        raise UserError("the two results have no row in common")
    return result


def table(row_changes: list[Change]) -> Table:
    """Return a table of the rows that changed by more than the noise."""
    result = Table("row", "before, ms", "after, ms", "change", "noise", "")
    for change in sorted(row_changes, key=lambda change: change.ratio):
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


def summary(before: dict[str, Any], after: dict[str, Any], row_changes: list[Change]) -> str:
    """Return one line with the number of rows that changed, and the parts of the noise."""
    verdicts = [change.verdict for change in row_changes]
    noises = sorted(change.noise - 1 for change in row_changes)
    return (
        f"{verdicts.count('unchanged')} rows unchanged, {verdicts.count('slower')} slower, "
        f"{verdicts.count('faster')} faster; commits {before['environment']['commit']} and "
        f"{after['environment']['commit']}; noise ±{noises[0]:.0%} to ±{noises[-1]:.0%}: the medians' uncertainty, "
        f"{machine_shift(before, after):.1%} change of the controls, and {FLOOR:.0%}"
    )

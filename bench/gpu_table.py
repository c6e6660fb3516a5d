"""What bench/gpu_check.sh found: a JSON file per part, and a short table of them all.

python -m bench.gpu_table OUT
python -m bench.gpu_table --collect PART STATUS OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.measure import by_group
from fastvit_train.tracking import read_rows

TARGET = 0.74
"""accuracy of the seed's recipe after 100 epochs on CIFAR-10 (JPEG copy)"""
PARTS = ("tests", "kernels", "steps", "epochs", "accuracy")


def collect(part: str, status: int, out: Path) -> None:
    """Make OUT/PART.json of what a part left, with its exit status: only one of 0 is not done again."""
    made = out / part / "bench.json"
    found: dict[str, Any] = {"environment": environment()}
    if part == "tests":
        said = (out / "tests.log").read_text().strip().splitlines()
        found["summary"] = said[-1] if said else ""
    elif part == "accuracy" and status == 0:
        found |= accuracy(out / part / "run")
    elif made.is_file():  # complete groups, even where the time was up
        found |= json.loads(made.read_text())
    (out / f"{part}.json").write_text(json.dumps({"exit_status": status, **found}, indent=1) + "\n")


def accuracy(run: Path) -> dict[str, Any]:
    """A run's summary, and the seconds, evaluations included, until the target was reached; null where it wasn't."""
    clock, reached = 0.0, None
    for row in read_rows(run / "metrics.jsonl"):
        clock += row["seconds"] + row["eval_seconds"]
        if reached is None and row["test_accuracy"] >= TARGET:
            reached = clock
    summary = json.loads((run / "summary.json").read_text())
    return {"target": TARGET, "seconds_to_target": reached, "seconds": clock, "summary": summary}


def rows(part: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """A part's lines of the table."""
    status = found["exit_status"]
    cut = [] if status == 0 else [(part, "the time was up" if status == 124 else f"exit status {status}")]
    if part == "tests":
        return [("GPU tests", found["summary"]), *cut]
    if part == "accuracy" and status == 0:
        run, seconds = found["summary"], found["seconds_to_target"]
        reached = "not reached" if seconds is None else f"{seconds:,.1f} s"
        return [
            (f"{run['dataset']}, {run['epochs']} epochs", f"{run['test_accuracy']:.2%} in {found['seconds']:,.1f} s"),
            (f"to {found['target']:.1%}", reached),
        ]
    return [*(best(group) for group in by_group(found.get("rows", []))), *cut]


def best(group: list[dict[str, Any]]) -> tuple[str, str]:
    """The fastest row of a group, against its first."""
    fastest = max(group, key=lambda row: row["images_per_second"])
    factor = fastest["images_per_second"] / group[0]["images_per_second"]
    milliseconds = fastest["images_per_call"] / fastest["images_per_second"] * 1e3
    share = "" if fastest["mfu"] is None else f", MFU {fastest['mfu']:.0%}"
    return (
        f"{group[0]['what']}, {group[0]['shape']}, {group[0]['dtype']}",
        f"{fastest['name']}: {milliseconds:,.3f} ms, {fastest['images_per_second']:,.0f} img/s{share}, "
        f"{factor:.1f}x {group[0]['name']}",
    )


def main() -> None:
    if sys.argv[1] == "--collect":
        collect(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    out = Path(sys.argv[1])
    table = Table("what", "found", title=str(environment()["device"]), title_justify="left")
    for part in PARTS:
        path = out / f"{part}.json"
        for what, said in rows(part, json.loads(path.read_text())) if path.is_file() else [(part, "not done")]:
            table.add_row(what, said)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()

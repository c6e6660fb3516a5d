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

PARTS = ("tests", "kernels", "steps", "epochs", "accuracy", "together")


def collect(part: str, status: int, out: Path) -> None:
    """Make OUT/PART.json of what a part left, with its exit status: only one of 0 is not done again."""
    made = out / part / "bench.json"
    found: dict[str, Any] = {"environment": environment()}
    if part == "tests":
        said = (out / "tests.log").read_text().strip().splitlines()
        found["summary"] = said[-1] if said else ""
    elif part == "accuracy" and status == 0:
        found |= json.loads((out / part / "run-3seeds.json").read_text())
    elif part == "together" and status == 0:
        found |= {"seconds": [seconds(path) for path in sorted((out / part).glob("*/summary.json"))]}
        found |= {"alone": [seconds(path) for path in sorted((out / "accuracy").glob("*/summary.json"))]}
    elif made.is_file():  # complete groups, even where the time was up
        found |= json.loads(made.read_text())
    (out / f"{part}.json").write_text(json.dumps({"exit_status": status, **found}, indent=1) + "\n")


def seconds(path: Path) -> float:
    """That the run of a summary.json trained and evaluated for."""
    summary = json.loads(path.read_text())
    return summary["train_seconds"] + summary["eval_seconds"]


def rows(part: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    """A part's lines of the table."""
    status = found["exit_status"]
    cut = [] if status == 0 else [(part, "the time was up" if status == 124 else f"exit status {status}")]
    if part == "tests":
        return [("GPU tests", found["summary"]), *cut]
    if part == "accuracy" and status == 0:
        accuracy, to_target, reached = found["test_accuracy"], found["seconds_to_target"], found["reached_target"]
        after = f", after {to_target['mean']:,.1f} s" if reached else ""
        return [
            (f"fast-cifar10, {len(found['seeds'])} seeds", f"{accuracy['mean']:.2%} ± {accuracy['std']:.2%}"),
            (f"to {found['target_accuracy']:.1%}", f"{reached} of them{after}"),
        ]
    if part == "together" and status == 0:
        at_once, alone = found["seconds"], found["alone"]
        return [(f"{len(at_once)} seeds at once", f"{max(at_once):,.1f} s; one after the other {sum(alone):,.1f} s")]
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

"""The results of bench/gpu_check.sh: a JSON file per part, and a short table of all parts.

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
    """Write OUT/PART.json from the output of a part and its exit status; a part is repeated unless the status is 0."""
    bench_json = out / part / "bench.json"
    result: dict[str, Any] = {"environment": environment()}
    if part == "tests":
        lines = (out / "tests.log").read_text(encoding="utf-8").strip().splitlines()
        result["summary"] = lines[-1] if lines else ""
    elif part == "accuracy" and status == 0:
        result |= json.loads((out / part / "run-3seeds.json").read_text(encoding="utf-8"))
    elif part == "together" and status == 0:
        result |= {"seconds": [seconds(path) for path in sorted((out / part).glob("*/summary.json"))]}
        result |= {"alone": [seconds(path) for path in sorted((out / "accuracy").glob("*/summary.json"))]}
    elif bench_json.is_file():  # holds the complete groups if the time ran out
        result |= json.loads(bench_json.read_text(encoding="utf-8"))
    (out / f"{part}.json").write_text(json.dumps({"exit_status": status, **result}, indent=1) + "\n", encoding="utf-8")


def seconds(path: Path) -> float:
    """Return the seconds that the run of a summary.json trained and evaluated."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary["train_seconds"] + summary["eval_seconds"]


def rows(part: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a part's lines of the table."""
    status = result["exit_status"]
    failure = [] if status == 0 else [(part, "the time ran out" if status == 124 else f"exit status {status}")]
    if part == "tests":
        return [("GPU tests", result["summary"]), *failure]
    if part == "accuracy" and status == 0:
        accuracy, to_target, reached = result["test_accuracy"], result["seconds_to_target"], result["reached_target"]
        after = f", after {to_target['mean']:,.1f} s" if reached else ""
        return [
            (f"fast-cifar10, {len(result['seeds'])} seeds", f"{accuracy['mean']:.2%} ± {accuracy['std']:.2%}"),
            (f"to {result['target_accuracy']:.1%}", f"{reached} of them{after}"),
        ]
    if part == "together" and status == 0:
        at_once, alone = result["seconds"], result["alone"]
        return [(f"{len(at_once)} seeds at once", f"{max(at_once):,.1f} s; one after the other {sum(alone):,.1f} s")]
    return [*(best(group) for group in by_group(result.get("rows", []))), *failure]


def best(group: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the fastest row of a group, with its speedup over the first row."""
    fastest = max(group, key=lambda row: row["images_per_second"])
    factor = fastest["images_per_second"] / group[0]["images_per_second"]
    milliseconds = fastest["images_per_call"] / fastest["images_per_second"] * 1e3
    share = "" if fastest["mfu"] is None else f", MFU {fastest['mfu']:.0%}"
    return (
        f"{group[0]['operation']}, {group[0]['shape']}, {group[0]['dtype']}",
        f"{fastest['name']}: {milliseconds:,.3f} ms, {fastest['images_per_second']:,.0f} img/s{share}, "
        f"{factor:.1f}x {group[0]['name']}",
    )


def main() -> None:
    if sys.argv[1] == "--collect":
        collect(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    out = Path(sys.argv[1])
    table = Table("part", "result", title=str(environment()["device"]), title_justify="left")
    for part in PARTS:
        path = out / f"{part}.json"
        for name, text in (
            rows(part, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else [(part, "not done")]
        ):
            table.add_row(name, text)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()

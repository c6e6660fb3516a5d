"""Everything that needs a GPU, in nine minutes and without a network; bench/gpu_check.sh starts it.

Only the standard library may be imported at the top: other packages may be missing until the wheels are unpacked.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.gpu_check import prepare
from bench.gpu_check.parts import TIME_RAN_OUT, Part, all_parts, describe_status

SECONDS = 520
"""for all parts together: nine minutes, less what the last one may take to stop"""
MIN_SECONDS = 15
"""A part is not started with less time."""
SECONDS_TO_STOP = 10
"""how long the commands of a part may take to end after an interrupt before they are killed"""


def main() -> int:
    started_at = time.monotonic()
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped too
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.wheels is not None:
            unpacked = prepare.add_wheels(arguments.wheels.resolve(), out / "site")
            print(f"unpacked from {arguments.wheels}: {', '.join(unpacked) or 'nothing'}")
        prepare.require_packages()
        environment = prepare.find_environment()
        print(", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))
        if environment["cuda"] is None and not arguments.any_device:
            raise prepare.NotReady("no GPU is available to torch; --any-device tries the check without one")
        images = arguments.images and prepare.find_images(arguments.images.resolve(), out / "images")
    except prepare.NotReady as reason:
        print(f"gpu_check: error: {reason}", file=sys.stderr)
        return 2
    results = Results(out / "results.json")
    factor = 10 if arguments.any_device else 1
    deadline = started_at + SECONDS * factor
    for part in all_parts(out, images):
        if part.name.startswith(arguments.parts):
            seconds = min(part.seconds * factor, deadline - time.monotonic())
            run_part(part, seconds, results, environment, out)
    from bench.gpu_check.table import show  # needs packages

    show(results.parts)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/gpu_check.sh", description=__doc__.partition(";")[0] + ".")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for results.json and logs")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that are missing")
    parser.add_argument("--images", type=Path, help="CIFAR-10 in train/CLASS/ and test/CLASS/: a folder or an archive")
    parser.add_argument(
        "--parts", nargs="+", default=[""], metavar="NAME", help="only parts whose names begin with NAME"
    )
    parser.add_argument("--any-device", action="store_true", help="try the check without a GPU")
    arguments = parser.parse_args()
    arguments.parts = tuple(arguments.parts)
    return arguments


class Results:
    """The results of the parts so far, in a file that is replaced after each part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add the result of a part, or replace it, and write the file."""
        self.parts[name] = result
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.parts, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)


def run_part(part: Part, limit: float, results: Results, environment: dict[str, Any], out: Path) -> None:
    """Run a part for at most `limit` seconds and keep its result, unless it has ended well before."""
    if results.parts.get(part.name, {}).get("exit_status") == 0:
        print(f"== {part.name}: done before")
        return
    if limit < MIN_SECONDS:
        print(f"== {part.name}: no time is left; run the same command again")
        return
    print(f"== {part.name}, at most {limit:.0f} s", end="", flush=True)
    shutil.rmtree(out / part.name, ignore_errors=True)  # what an attempt before left there is not this one's result
    log, started = out / f"{part.name}.log", time.monotonic()
    status = run_together(part.commands, log, limit)
    seconds = time.monotonic() - started
    print(f": {seconds:.1f} s" + ("" if status == 0 else f", {describe_status(status)}; see {log}"))
    facts = {"exit_status": status, "seconds": seconds, "environment": environment}
    results.add(part.name, facts | part.results(log, out / part.name))


def run_together(commands: tuple[tuple[str, ...], ...], log: Path, seconds: float) -> int:
    """Run commands at the same time, their output in `log`; return the first exit status that is not 0, or 0.

    After `seconds` the commands are stopped, with all processes that they started; the status is then `TIME_RAN_OUT`.
    """
    deadline = time.monotonic() + seconds
    with log.open("w", encoding="utf-8") as output, started(commands, output) as processes:
        try:
            statuses = [process.wait(max(0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            return TIME_RAN_OUT
    return next((status for status in statuses if status), 0)


@contextmanager
def started(commands: tuple[tuple[str, ...], ...], output: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start Python once per command, each in a process group of its own; stop all at once at the end of the context."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=prepare.ROOT, stdout=output, stderr=output, start_new_session=True
            )
            processes.append(process)
        yield processes
    finally:
        signal_groups(signal.SIGINT, processes)  # pytest then prints its summary
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
        finally:
            signal_groups(signal.SIGKILL, processes)


def signal_groups(number: signal.Signals, processes: list[subprocess.Popen[bytes]]) -> None:
    """Send a signal to each process's group that still exists."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())

"""Trainings in separate processes that are killed, signalled or starved of resources, and their outcomes.

The processes are forked from a server that has imported everything, so that each starts within a second. Some tests in
tests/reliability start a new interpreter instead.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastvit_train.runs import checkpoint
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.utils import atomic_io

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.reliability.preloaded"])
# Dropout and a moving average, so that the random state and the average must be restored; gradient accumulation;
# checkpoints within epochs, which have 11 steps, so that the checkpoints are at different steps of each epoch.
SETTINGS = (
    *("--epochs", "3", "--batch-size", "120", "--grad-accum", "2", "--ema", "0.9", "--drop-rate", "0.1"),
    *("--embed-dim", "16", "--depth", "2", "--num-heads", "2", "--patch-size", "8", "--save-every", "3"),
    *("--attention", "fused", "--target-accuracy", "0.2"),
)
CLOCK = (
    "seconds", "eval_seconds", "images_per_second", "peak_memory_mib", "energy_joules", "mean_power_watts",
    "gpu_utilization",
)  # fmt: skip
LIMIT = 300.0
"""seconds after which a process counts as hanging; far more than it needs on a busy machine"""
PATIENCE = 10.0
"""seconds within which a process must end after another process of the same run has failed"""
Trick = Callable[[], None]
"""a function that a victim calls before it trains, to break something in its own process"""


class Victim:
    """A training that is running, in one or more processes."""

    def __init__(
        self,
        runs: Path,
        name: str,
        *more: object,
        processes: int = 1,
        trick: Trick | None = None,
        log: Path | None = None,
    ) -> None:
        self.folder = runs / name
        self.log = log or runs / f"{name}.out"
        runs.mkdir(parents=True, exist_ok=True)
        argv = ["--runs-dir", str(runs), "--exp-name", name, *SETTINGS, *map(str, more)]
        worlds = _world(processes)
        self.processes = [SERVER.Process(target=_train, args=(argv, self.log, world, trick)) for world in worlds]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = LIMIT) -> list[int | None]:
        """The processes' exit statuses, a signal's number negative.

        All are killed after `seconds`, or a while after one failed, as a launcher does.
        """
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + PATIENCE)
            time.sleep(0.01)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def has(self, text: str) -> bool:
        """Whether the processes have printed `text` so far."""
        return self.log.exists() and text in self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not self.has(text):
            assert time.monotonic() < deadline and any(p.is_alive() for p in self.processes), self.log.read_text()
            time.sleep(0.01)


def _world(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(processes)
    ]


def _train(argv: Sequence[str], log: Path, world: dict[str, str], trick: Trick | None) -> None:
    """Run `python -m fastvit_train ARGV` in this process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(world, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from fastvit_train.cli.main import main

    if trick is not None:
        trick()
    main(argv)
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class DieAt:
    """Make a process send itself a signal just before it calls a function for the n-th time."""

    where: str
    """MODULE.FUNCTION of fastvit_train"""
    call: int
    number: int = signal.SIGKILL
    rank: int = 0
    """the rank that sends itself the signal"""
    trick: Trick | None = None
    """another trick to apply first"""

    def __call__(self) -> None:
        if self.trick is not None:
            self.trick()
        module_name, _, name = self.where.rpartition(".")
        module = __import__(f"fastvit_train.{module_name}", fromlist=[name])
        original, calls = getattr(module, name), 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and self.rank == int(os.environ.get("RANK", 0)):
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        setattr(module, name, call)


def forget_the_samplers_position() -> None:
    """A deliberate fault: checkpoints do not record the step within the epoch."""
    original = checkpoint.asdict
    checkpoint.asdict = lambda progress: {k: v for k, v in original(progress).items() if k != "step_in_epoch"}


def outcome(folder: Path) -> dict[str, Any]:
    """Return what must be the same in a finished run whether or not it was stopped and resumed, for use with ==."""
    last = folder / "checkpoints" / "last"
    assert atomic_io.find_damage(last) is None
    progress = json.loads((last / "progress.json").read_text())["progress"]
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in read_jsonl(folder / "metrics.jsonl")]
    return {
        "weights": _bytes(load_file(folder / "model.safetensors")),
        "best weights": _bytes(load_file(folder / "best.safetensors")),
        "model": _bytes(load_file(last / "model.safetensors")),
        "average": _bytes(load_file(last / "model_1.safetensors")),
        "optimizer": _bytes(_flat(torch.load(last / "optimizer.bin", weights_only=True)["state"])),
        "metrics": rows,
        "steps": (folder / "steps.jsonl").read_text(),
        "best": (progress["best_step"], progress["best_accuracy"], (folder / "checkpoints" / "best").resolve().name),
        "target": progress["epochs_to_target"],
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


@functools.cache
def undisturbed(processes: int) -> dict[str, Any]:
    """Return the outcome of a run that is not disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder), "undisturbed", processes=processes)
        assert victim.wait() == [0] * processes, victim.log.read_text()
        return outcome(victim.folder)


def _flat(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in _flat(value, f"{name}.{key}").items()}
    return {name: torch.tensor(state)}


def _bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the parts that differ between two outcomes."""
    return [part for part in expected if found[part] != expected[part]]


def random_trick(stream: random.Random, number: int, rank: int = 0) -> DieAt:
    """Return a random point for a signal: a step, an evaluation, a part of a checkpoint, or a line of the metrics."""
    where, most = stream.choice(
        [
            ("training.loop._train_step", 33),
            ("training.loop._train_step", 33),
            ("training.loop.evaluate_model", 3),
            ("utils.atomic_io.write_checksums", 12),
            ("utils.atomic_io.publish_folder", 12),
            ("utils.atomic_io.link", 12),
            ("utils.atomic_io.append", 6),
            ("training.metrics.record_epoch", 3),
            ("training.metrics.write_weights", 3),
            ("runs.checkpoint._prune", 12),
        ]
    )
    return DieAt(where, stream.randint(1, most), number, rank)

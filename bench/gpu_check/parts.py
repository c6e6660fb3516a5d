"""The parts of the check: the commands that each runs, and what it takes from their output."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--mixed_precision", "bf16")
TRAIN = (*LAUNCH, "-m", "fastvit_train", "--compile", "--dataset", "folder")
SEEDS = 3
TIME_RAN_OUT = 124
"""exit status of a part that took longer than its limit"""
NARROW, WIDE = "B4096 N64 D48 H4, bf16", "B1024 N256 D256 H4, bf16"
OPERATOR_ROWS = ("sdpa", "compiled", "triton")
STEP_ROWS = ("sdpa, step graphed", "triton, step graphed")


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: its name, that of its log, and that of the folder to which its commands write.
        seconds: its time limit.
        commands: arguments of Python; the commands run at the same time.
        results: returns what is kept of the part, from its log and its folder; they may be incomplete or missing.
    """

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    results: Callable[[Path, Path], dict[str, Any]] = field(repr=False)


def all_parts(work: Path, images: Path | None) -> list[Part]:
    """Return all parts in their order; those that train on `images` only if there are some.

    Args:
        work: the folder below which each part writes to a folder of its own name.
    """

    def bench(name: str, seconds: int, group: str, *rows: str) -> Part:
        only = [f"{group}, {row}" for row in rows]
        command = ("-m", "bench", "--seconds", "0.3", "--output", str(work / name), "--only", *only)
        return Part(name, seconds, (command,), bench_rows)

    tests = ("-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    return [
        bench("attention-narrow", 45, f"attention operator forward+backward, {NARROW}", *OPERATOR_ROWS),
        bench("attention-narrow-forward", 40, f"attention operator forward, {NARROW}", *OPERATOR_ROWS),
        bench("attention-wide", 45, f"attention operator forward+backward, {WIDE}", *OPERATOR_ROWS),
        bench("attention-wide-forward", 40, f"attention operator forward, {WIDE}", *OPERATOR_ROWS),
        bench("step-256", 50, "training step, mc_vit_4_4_32 B256, bf16", *STEP_ROWS),
        bench("step-4096", 50, "training step, mc_vit_4_4_32 B4096, bf16", *STEP_ROWS),
        bench("epochs", 60, "epoch end to end, mc_vit_4_4_32, 4096 images, B256, fp32 and bf16", ""),
        *([] if images is None else training_parts(work, images)),
        Part("tests", 90, (tests,), last_line),
        bench("step-cvt", 70, "training step, cvt_7_4_32 B256, bf16", *STEP_ROWS),
        bench("step-cct", 70, "training step, cct_7_3x1_32 B256, bf16", *STEP_ROWS),
    ]


def training_parts(work: Path, images: Path) -> list[Part]:
    """Return the parts that train on `images`: one seed after the other, the same seeds at the same time, CVT-7/4."""
    train = (*TRAIN, "--data-dir", str(images))
    fast = (*train, "--recipe", "fast-cifar10", "--epochs", "8")
    repeat = (*fast, "--repeat", str(SEEDS), "--runs-dir", str(work / "accuracy"), "--exp-name", "run")
    together = tuple(
        (*fast, "--seed", str(seed), "--runs-dir", str(work / "together"), "--exp-name", f"run-seed{seed}")
        for seed in range(SEEDS)
    )
    cvt = (*train, "--recipe", "cvt-cifar10", "--runs-dir", str(work / "cvt"), "--exp-name", "run")
    return [
        Part("accuracy", 70, (repeat,), trained_runs),
        Part("together", 50, together, trained_runs),
        Part("cvt", 100, (cvt,), trained_runs),
    ]


def describe_status(status: int) -> str:
    """Say how a part that failed ended."""
    return "the time ran out" if status == TIME_RAN_OUT else f"exit status {status}"


def bench_rows(log: Path, folder: Path) -> dict[str, Any]:
    """Return the rows of `python -m bench`, once it has measured its group."""
    path = folder / "bench.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def last_line(log: Path, folder: Path) -> dict[str, Any]:
    """Return the last line of the log, which is pytest's summary."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"summary": lines[-1] if lines else ""}


def trained_runs(log: Path, folder: Path) -> dict[str, Any]:
    """Return the epochs of each training run, also of one that did not end: accuracy, and seconds since its start.

    The seconds are those of training and evaluation; the first passes, which compile, are counted apart.
    """
    runs = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        seconds, epochs = 0.0, []
        for line in path.read_text(encoding="utf-8").splitlines():
            epoch = json.loads(line)
            seconds += epoch["seconds"] + epoch["eval_seconds"]
            epochs.append({"accuracy": epoch["test_accuracy"], "seconds": seconds})
        runs.append({"name": path.parent.name, "epochs": epochs})
    return {"runs": runs}

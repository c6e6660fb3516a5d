"""Measurements that later processes read: one file per case, machine and version in the user's cache folder."""

import functools
import hashlib
import json
import math
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from fastvit_kernels.autotune.choice import PARTS, Case, Choice
from fastvit_kernels.registry import candidates


def read(case: Case) -> Choice | None:
    """Return what an earlier process measured; None if there is no such file, or if it is damaged."""
    try:
        path = _path(case)
        entries = json.loads(path.read_text(encoding="utf-8"))
        samples = {str(name): tuple(map(float, values)) for name, values in entries["samples"].items()}
        unsupported = {str(name): str(reason) for name, reason in entries["unsupported"].items()}
        compile_seconds = float(entries["compile_seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    known = {*samples, *unsupported} == set(candidates(case.device))
    valid = all(len(values) == PARTS and all(0 < ms < math.inf for ms in values) for values in samples.values())
    if not (samples and known and valid):
        return None
    return Choice(str(case), samples, compile_seconds, unsupported, file=path)


def write(case: Case, choice: Choice) -> Choice:
    """Remember `choice` for later processes; returns the choice to use.

    That is what another process wrote meanwhile, if there is such a file, so that processes that start together agree.
    If the file cannot be written, or if an implementation failed, the next process measures again.
    """
    if choice.failed:  # it may succeed next time, as with more free memory
        return choice
    if (written := read(case)) is not None:
        return written
    entries = {
        "case": choice.case,
        "samples": choice.samples,
        "unsupported": choice.unsupported,
        "compile_seconds": choice.compile_seconds,
    }
    with suppress(OSError):  # such as a folder that is read-only, or a full disk
        path = _path(case)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return choice


def _path(case: Case) -> Path:
    """Name the file after everything that the times depend on."""
    facts = (
        case,
        candidates(case.device),
        _machine(case.device),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.__version__,
        _sources(),
    )
    return _folder() / f"attention-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not os.path.isabs(base):  # the specification says to ignore relative paths
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise OSError("the user has no home folder")
    return Path(base) / "fastvit_kernels"


def _machine(device: torch.device) -> str:
    """Describe the hardware: the processor, and the GPU if that is where the attention runs."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"


@functools.cache
def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


@functools.cache
def _sources() -> str:
    """Hash the sources of this package, so that a version that computes otherwise is measured again."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(path for ending in ("py", "cpp", "h") for path in folder.rglob(f"*.{ending}")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

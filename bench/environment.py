"""The hardware and software that the measurements depend on."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.benchmark_case import device_name
from fastvit_train.utils import machine

ROOT = Path(__file__).parents[1]


@cache
def environment() -> dict[str, Any]:
    """Return device, driver, versions, threads, precision and commit; None for what is not available."""
    return {
        "device": device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "timm": installed("timm"),
        "accelerate": installed("accelerate"),
        "threads": torch.get_num_threads(),
        "cores": machine.usable_cores(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(),
    }


def installed(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # the import may fail too, and no failure here may stop a benchmark
        return None


def commit() -> str | None:
    """Return the commit that is checked out, with "+changes" if files differ from it; None outside of git."""
    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    """Run git and return its output."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, encoding="utf-8")
    return done.stdout.strip()

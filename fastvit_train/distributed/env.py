"""What the launcher says in the environment, and the CPU threads that follow."""

import os

import psutil
import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def launcher() -> list[str] | None:
    """The command line of the launcher that this process is a child of, accelerate's or torch's; None without one."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    is_accelerates = under_launcher() and any("accelerate" in word for word in words)
    return words if is_accelerates or "TORCHELASTIC_RUN_ID" in os.environ else None


def sharded() -> bool:
    """True where the launch shards the model over the processes (FSDP)."""
    return is_set("ACCELERATE_USE_FSDP")


def launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on")


def is_rank0() -> bool:
    """True on the process that speaks for all, before there is an Accelerator."""
    return int(os.environ.get("RANK", 0)) == 0


def under_launcher() -> bool:
    """True where `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def use_all_cores() -> str:
    """Set torch's CPU threads to the physical cores over the local processes; returns what was done, in words.

    accelerate's launcher and torch's agent set OMP_NUM_THREADS=1 where the user set nothing, which halves a
    laptop's speed or worse. A number that the user did set is kept.
    """
    if _user_set_threads():
        return f"{torch.get_num_threads()} CPU threads per process (as set by the environment)"
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    processes = local_processes()
    threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    return f"{threads} CPU threads per process ({cores} cores, {processes} local processes)"


def _user_set_threads() -> bool:
    if not any(name in os.environ for name in THREAD_VARIABLES):
        return False
    if not (under_launcher() or "TORCHELASTIC_RUN_ID" in os.environ) or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        launcher = psutil.Process().parent()
        if launcher is None:
            return False
        told = any(argument.startswith("--num_cpu_threads") for argument in launcher.cmdline())
        return told or any(name in launcher.environ() for name in THREAD_VARIABLES)
    except psutil.Error:
        return False


def local_processes() -> int:
    """How many processes of this run share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

"""How many CPU threads torch uses in each process."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from fastvit_train.distributed import env
from fastvit_train.utils import machine
from fastvit_train.utils.errors import counted


@contextmanager
def all_cores() -> Iterator[str]:
    """Let torch use all cores inside the context, as `use_all_cores` does, and restore the number of threads after it.

    Yields:
        What was set, in words.
    """
    threads = torch.get_num_threads()
    try:
        yield use_all_cores()
    finally:
        torch.set_num_threads(threads)


def use_all_cores() -> str:
    """Set torch's CPU threads to the usable cores divided by the local world size; returns what was set, in words.

    Accelerate's launcher and torch's agent set OMP_NUM_THREADS=1 if the user set nothing, which halves a laptop's
    speed or worse. A number that the user set is kept.
    """
    if _user_set_threads():
        return f"{counted(torch.get_num_threads(), 'CPU thread')} per process (as set by the environment)"
    cores, processes = machine.usable_cores(), env.local_world_size()
    threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    where = f"{counted(cores, 'core')}, {counted(processes, 'local process')}"
    return f"{counted(threads, 'CPU thread')} per process ({where})"


def _user_set_threads() -> bool:
    """Whether the number of threads comes from the user rather than from a launcher's default of 1."""
    if not env.has_thread_count():
        return False
    launched = env.under_launcher() or env.under_torchelastic()
    if not launched or env.get("OMP_NUM_THREADS", "1") != "1":
        return True
    try:
        launcher = psutil.Process().parent()
        if launcher is None:
            return False
        by_flag = any(argument.startswith("--num_cpu_threads") for argument in launcher.cmdline())
        return by_flag or env.has_thread_count(launcher.environ())
    except psutil.Error:
        return False

"""What this process may use of the machine: cores and memory, within its CPU affinity and its container's limits."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Linux: the control groups of this process, and where the kernel shows all groups (man 7 cgroups)"""


def usable_cores() -> int:
    """Return the number of physical cores that this process may use, at least 1."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min([cores, *map(int, _cpu_quotas())]))


def total_memory() -> int:
    """Return the bytes of memory that this process and its container may use at most."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Return the bytes of memory that this process can still allocate."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _memory_limits())]))


class OtherProcesses:
    """Measures, from its construction on, how many cores the processes keep busy that this one did not start."""

    def __init__(self) -> None:
        self.started, self._others = time.perf_counter(), _seconds_of_others()

    def cores(self) -> float:
        """Return the mean number of cores since the construction, 0 on a quiet machine."""
        return max(0.0, _seconds_of_others() - self._others) / (time.perf_counter() - self.started)


def _seconds_of_others() -> float:
    """Return the seconds that cores have worked for other processes, and for other virtual machines ("steal")."""
    machine, own = psutil.cpu_times(), 0.0
    processes = [psutil.Process()]
    with suppress(psutil.Error):  # not every system shows them
        processes += processes[0].children(recursive=True)
    for process in processes:
        with suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            own += times.user + times.system + times.children_user + times.children_system
    working = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(machine, name, 0.0) for name in working) - own


def _cpu_quotas() -> Iterator[float]:
    """Yield the limits in CPUs of the groups around this process: of version 2, then of version 1."""
    for group in _groups("cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        quota = quota or _read(group / "cpu.cfs_quota_us")
        period = period or _read(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # otherwise "max" or -1: no limit
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield the limits of the groups around this process, and what they use, without files that can be dropped."""
    for group in _groups("memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal():
            stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            yield int(limit), int(used) - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, and of the groups that those are in.

    A container may see the paths of its host here, while its folder shows only its own group: missing folders are
    passed over, and the root is always yielded.
    """
    for line in _read(MEMBERSHIP).splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for mount in {CGROUPS / name for name in (names, controller)} if names else (CGROUPS, CGROUPS / "unified"):
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield mount / group.relative_to("/")


def _read(path: Path) -> str:
    """Return the content of a file of the kernel; empty if there is none."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""

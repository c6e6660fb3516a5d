"""The cores and the memory of a container, from the files of both versions of control groups."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastvit_train.utils import machine

GB = 10**9
HOST_PATH = "/docker/0a1b"
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`container(membership, files)` makes a machine of 8 cores and 64 GB that shows these control groups."""
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    memory = psutil.virtual_memory()._replace(total=64 * GB, available=40 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def make(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return make


def found() -> tuple[int, int, int]:
    return machine.usable_cores(), machine.total_memory() // GB, machine.available_memory() // GB


def test_without_limits_it_is_the_whole_machine(container) -> None:
    assert found() == (8, 64, 40)
    container("0::/\n", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "1"})
    assert found() == (8, 64, 40)


def test_version_2(container) -> None:
    stat = f"anon 1\ninactive_file {3 * GB}"
    files = {"cpu.max": "250000 100000", "memory.max": 16 * GB, "memory.current": 10 * GB, "memory.stat": stat}
    container("0::/\n", files)
    assert found() == (2, 16, 9)


def test_the_limits_of_outer_groups_hold_too(container) -> None:
    files = {
        "slice/cpu.max": "300000 100000",
        "slice/job/cpu.max": "max 100000",
        "slice/job/step/cpu.max": "400000 100000",
    }
    memory = {"slice/memory.max": 8 * GB, "slice/memory.current": GB, "slice/job/memory.max": "max"}
    container("0::/slice/job/x\n", files | memory)
    assert found() == (3, 8, 7)


@pytest.mark.parametrize("path", ["/", HOST_PATH])  # a container may show the host's path for its own root
@pytest.mark.parametrize("cpu", ["cpu,cpuacct", "cpu"])
def test_version_1(container, path: str, cpu: str) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": 150000, "cpu/cpu.cfs_period_us": 50000, "memory/memory.limit_in_bytes": 4 * GB,
        "memory/memory.usage_in_bytes": 3 * GB, "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}",
    }  # fmt: skip
    container(f"4:memory:{path}\n3:{cpu}:{path}\n1:name=systemd:/\n", files)
    assert found() == (3, 4, 3)


def test_version_1_without_limits(container) -> None:
    files = {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": V1_UNLIMITED}
    container("4:memory:/\n3:cpu:/\n", files | {"memory/memory.usage_in_bytes": GB})
    assert found() == (8, 64, 40)


def test_less_than_one_core_and_a_small_affinity(container, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: {3, 5, 6}, raising=False)
    assert machine.usable_cores() == 3
    container("0::/\n", {"cpu.max": "50000 100000"})
    assert machine.usable_cores() == 1


def test_what_this_process_and_its_children_do_is_not_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's cores have worked for three seconds: for one of them here, in a child; the others are counted."""
    worked = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: worked)  # as it is when called
    others = machine.OtherProcesses()
    busy = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    worked = worked._replace(user=worked.user + 2, system=worked.system + 1)
    seconds = others.cores() * (time.perf_counter() - others.started)
    assert seconds == pytest.approx(2, abs=0.3)

"""Freed memory is retained by the process, and the peak is measured from its last reset."""

import sys

import pytest

from tests.support import run

FAULTS = """
import resource, sys, torch
import fastvit_train.training.loop  # the heap of a real training: with a smaller one malloc places the tensor elsewhere
from fastvit_train.utils import memory
kept = memory.retain_freed_memory() if sys.argv[1] == "kept" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(40 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, min(faults() for _ in range(3)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_reused_without_page_faults() -> None:
    pages = 40 * 2**20 // 4096
    output = run([sys.executable, "-c", FAULTS, "kept"]).stdout.split()
    if output[0] == "False":
        pytest.skip("another C library")
    assert int(output[1]) < pages / 100
    assert run([sys.executable, "-c", FAULTS, "kept"], MALLOC_TRIM_THRESHOLD_="1000").stdout.split()[0] == "False"


PEAKS = """
import torch
from fastvit_train.utils import memory
cpu = torch.device("cpu")
held = torch.ones(200 * 2**20, dtype=torch.uint8)
print(memory.peak_mib(cpu))
del held
memory.reset_peak_memory(cpu)
print(memory.peak_mib(cpu))
part = torch.ones(100 * 2**20, dtype=torch.uint8)
print(memory.peak_mib(cpu))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak can't be reset on other systems")
def test_the_peak_is_measured_from_its_last_reset() -> None:
    # In a process of its own: one that has trained retains freed memory, where a tensor adds nothing to the peak.
    high, low, later = map(float, run([sys.executable, "-c", PEAKS]).stdout.split())
    assert low <= high - 190 and low + 90 <= later <= low + 110

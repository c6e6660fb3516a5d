"""Freed memory is retained by the process, and the peak is measured from its last reset."""

import sys

import pytest
import torch

from fastvit_train.utils import memory
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


def test_the_peak_is_measured_from_its_last_reset() -> None:
    if sys.platform != "linux":
        pytest.skip("the peak can't be reset on other systems")
    cpu = torch.device("cpu")
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    high = memory.peak_mib(cpu)
    del held
    memory.reset_peak_memory(cpu)
    low = memory.peak_mib(cpu)
    torch.ones(50 * 2**20, dtype=torch.uint8)
    # After a training in this process glibc retains freed memory, and the interpreter may take a few pages more.
    assert low <= high + 1 and low <= memory.peak_mib(cpu) <= max(high + 1, low + 150)
    part = torch.ones(400 * 2**20, dtype=torch.uint8)
    assert memory.peak_mib(cpu) >= low + 190 and len(part)

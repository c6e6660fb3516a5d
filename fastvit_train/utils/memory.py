"""Memory of the process and of the GPU: freed memory that is retained, the peak, and what autograd saves."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastvit_train.utils import machine

# mallopt's parameters, from malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
USER_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def retain_freed_memory() -> bool:
    """Make glibc retain freed memory for the next tensors; returns whether it does.

    By default glibc requests the memory of each large tensor from the system and returns it afterwards, so that every
    step causes page faults for all of its memory. They can take up to half of a step on a CPU. Nothing is changed for
    other C libraries, or if an environment variable sets one of these options.
    """
    if sys.platform != "linux" or any(name in os.environ for name in USER_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: 64 * 2**20}
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_mib`; on a CPU this has an effect on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the tensors on a GPU, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        peaks = [
            line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        ]
        if peaks:
            return int(peaks[0]) / 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def capacity_mib(device: torch.device, processes: int = 1) -> float:
    """Return how far `peak_mib` could rise, in MiB: what this process has, and its share of what is free.

    Args:
        device: a GPU of this process's own, or a CPU.
        processes: the number that share the CPU's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / 2**20
    return (machine.available_memory() / processes + psutil.Process().memory_info().rss) / 2**20


def saved_for_backward(run: Callable[[], object], parameters: tuple[Tensor, ...]) -> int:
    """Count the bytes that autograd saves for the backward pass in one call of `run`.

    A storage is counted once and in full, however many views of it are saved. The storages of `parameters` are not
    counted, because they exist anyway.
    """
    parameter_storages = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    storages: dict[int, torch.UntypedStorage] = {}  # references, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())

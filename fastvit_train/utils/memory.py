"""The process's memory: kept from step to step, the most that was taken at once, and what autograd keeps."""

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

# mallopt's parameters, from malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = 2**31 - 1
USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def retain_freed_memory() -> bool:
    """Let the C library keep what is freed for the next tensors; True where it will.

    By default glibc takes each large tensor from the system anew and gives it back, so that every step touches all of
    its pages for the first time: up to half of a step on a CPU, more or less of it as the heap's history has it. Other
    C libraries are left alone, and so is one whose user set this in the environment.
    """
    if sys.platform != "linux" or any(name in os.environ for name in USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: 64 * 2**20}
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_mib` count from here on; on a CPU that works on Linux alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """MiB: the most that tensors took on a GPU; on a CPU the most that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) / 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def saved_for_backward(run: Callable[[], object], parameters: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps between forward and backward in one call of `run`.

    Counted by saved-tensor hooks: each storage once, however many views of it are saved, in full; the storages of
    `parameters` are not counted, as they are there anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())

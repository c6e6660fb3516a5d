"""A row of a benchmark: what is timed, how it is known to be right, and what it is compared with."""

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit_train.distributed.cpu_threads import use_all_cores
from fastvit_train.utils import memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
"""largest distance from the reference, over the reference's norm"""
CALLS = {"cpu": 1, "cuda": 20}
"""of a step or a pass between two synchronisations: outer timing would inflate what takes microseconds"""
CHECK_BATCH = 4
"""images with which a row is checked where nothing is timed"""


def device() -> torch.device:
    """The device that everything is timed on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Work:
    """Something ready to be timed.

    Attributes:
        run: one call; it may leave the device at work.
        check: raises AssertionError unless `run` computes the right thing; it may call it.
        images: that one call works through.
        flops: of one call by definition: unpadded, nothing recomputed; None where counting makes no sense.
        parameters: not counted among what autograd saves for backward; None where nothing is saved.
        calls: of `run` between two synchronisations of the device.
        replayed: `run` replays a CUDA graph, whose memory was taken when it was recorded.
        alternate: something else to do before each timed round, so that both are measured in turn.
        close: frees what garbage collection doesn't.
        extra: figures of this kind of work, asked for after the timing.
    """

    run: Callable[[], object]
    check: Callable[[], None]
    images: int
    flops: float | None = None
    parameters: tuple[Tensor, ...] | None = None
    calls: int = 1
    replayed: bool = False
    alternate: Callable[[], object] | None = None
    close: Callable[[], object] = lambda: None
    extra: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Case:
    """One row; rows of one (what, shape, dtype) on one device are a group, to be compared with each other.

    Attributes:
        name: the row's own.
        batch: images per call when it is timed.
        build: of a number of images per call; called when it is the row's turn.
        unavailable: why it can't run here.
        slow_check: checking it takes long, mostly to compile; plain `pytest` leaves it to `pytest -m slow`.
    """

    what: str
    shape: str
    dtype: str
    name: str
    batch: int
    build: Callable[[int], Work]
    unavailable: str | None = None
    slow_check: bool = False

    @property
    def group(self) -> str:
        return f"{self.what}, {self.shape}, {self.dtype}, {device_name()}"

    @property
    def id(self) -> str:
        return f"{self.what}, {self.shape}, {self.dtype}, {self.name}"


def device_name() -> str:
    """The device as people call it, the CPU's with the instruction set that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


def assert_close(found: Tensor, wanted: Tensor, dtype: str, what: str) -> None:
    """Raise AssertionError unless the tensors agree as well as `dtype` allows."""
    wanted = wanted.double()
    distance = (found.double().to(wanted.device) - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert distance <= TOLERANCES[dtype], f"{what}: {distance:.1e} from the reference, allowed {TOLERANCES[dtype]:.0e}"


def prepare_process() -> None:
    """Threads and memory as a training on this device sets them."""
    use_all_cores()
    if device().type == "cpu":
        memory.retain_freed_memory()


def many_compiled_at_once() -> AbstractContextManager[None]:
    """Within it, rows that compile the same code for other shapes live side by side, each for its own shape."""
    limits: dict[str, Any] = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, **limits)

"""How this process fits among the others: the Accelerator, the CPU threads, and what can be wrong with a launch."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from torch import nn

from fastvit_train.data.images import local_processes
from fastvit_train.errors import UserError

Result = TypeVar("Result")
WAIT_FOR_FIRST_PROCESS = timedelta(hours=3)  # while it downloads and decodes
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def start(grad_accum: int, trackers: tuple[str, ...], run_dir: Path) -> Accelerator:
    """The Accelerator of this process; mixed precision and the number of processes come from the launch.

    Raises:
        UserError: where a tracker isn't installed, or the launch started more processes than joined up.
    """
    # torch.compile would begin on a CPU machine with a warning about a CUDA that it found no runtime of.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine without an accelerator would each believe they are alone.
            cpu=not torch.accelerator.is_available(),
            gradient_accumulation_steps=grad_accum,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=WAIT_FOR_FIRST_PROCESS),
            ],
        )
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UserError(
            f"the launch started {launched} processes, but this one sees {accelerator.num_processes}; "
            "start them with `accelerate launch --multi_gpu --num_processes N`, on a CPU machine too"
        )
    missing = sorted(
        set(trackers) - {tracker if isinstance(tracker, str) else tracker.value for tracker in accelerator.log_with}
    )
    if missing:
        raise UserError(f"--track {' '.join(missing)} is not installed; pip install {' '.join(missing)}")
    return accelerator


def part() -> None:
    """Let go of the other processes; the last thing that a command does."""
    PartialState().destroy_process_group()


def broadcast_only_what_changes(accelerator: Accelerator, model: nn.Module) -> None:
    """Let DDP broadcast the model's buffers, in every forward pass, only where training changes them: batch norm."""
    if accelerator.ddp_handler is not None:
        norms = (isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        accelerator.ddp_handler.broadcast_buffers = any(norms)


def check_compiled_once(compiled: bool) -> None:
    """Raise UserError where --compile meets a launch that compiles the model too."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiled and backend.upper() != "NO":
        raise UserError(f"--compile and the launch's dynamo backend {backend!r} both compile the model; leave one out")


def everywhere(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do `action` on every process and wait for all; a UserError on any of them is raised on all of them.

    Without this, the others would wait in vain for the one that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    first = next((error for error in gather_object([failure]) if error is not None), None)
    if first is not None:
        first.everywhere = True
        raise first
    return cast(Result, result)


def is_first_process() -> bool:
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


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type

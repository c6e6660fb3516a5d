"""How this process fits among the others: the Accelerator, the CPU threads, and what can be wrong with a launch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from fastvit_train.distributed.preflight import check_devices, check_joined, check_kind, check_precision
from fastvit_train.utils.errors import UserError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WAIT_FOR_FIRST_PROCESS = timedelta(hours=3)  # while it downloads and decodes


def start_accelerator(grad_accum: int, trackers: tuple[str, ...], run_dir: Path) -> Accelerator:
    """The Accelerator of this process; mixed precision and the number of processes come from the launch.

    Raises:
        UserError: where a tracker isn't installed, or the launch asks for what this machine or this trainer lacks, or
            for more processes than joined up.
    """
    check_kind()
    check_devices()
    check_precision()
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine without an accelerator would each believe they are alone.
            cpu=not torch.accelerator.is_available(),
            gradient_accumulation_steps=grad_accum,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir)),
            kwargs_handlers=[InitProcessGroupKwargs(init_method=_meeting_place(), timeout=WAIT_FOR_FIRST_PROCESS)],
        )
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    check_joined(accelerator.num_processes)
    if accelerator.gradient_accumulation_steps != grad_accum:
        variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        raise UserError(f"{variable}={os.environ[variable]} is not --grad-accum {grad_accum}; unset it")
    missing = sorted(
        set(trackers) - {tracker if isinstance(tracker, str) else tracker.value for tracker in accelerator.log_with}
    )
    if missing:
        raise UserError(f"--track {' '.join(missing)} is not installed; pip install {' '.join(missing)}")
    return accelerator


def _meeting_place() -> str | None:
    """Where the processes find each other's addresses: torch's own place, after a restart one of the attempt's own.

    accelerate's launcher keeps one store for all attempts, where the addresses of the processes that died still are.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return None

    def meet(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[Store, int, int]]:
        for store, rank, world_size in rendezvous("env://", timeout=timeout):
            yield PrefixStore(f"attempt_{restarts}", store), rank, world_size

    with suppress(RuntimeError):  # registered before, for another run of this process
        register_rendezvous_handler("attempt", meet)
    return "attempt://"


def leave_process_group() -> None:
    """Let go of the other processes; the last thing that a command does."""
    PartialState().destroy_process_group()


@contextmanager
def deterministic() -> Iterator[None]:
    """Let every operator give the same bits on every run inside the context, and restore torch's switches after it.

    An operator without a deterministic implementation raises RuntimeError when it is called. Enter the context before
    the GPU is used: cuBLAS reads its environment variable once, when it starts.
    """
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_switches = cudnn.deterministic, cudnn.benchmark
    workspace_was_set = CUBLAS_WORKSPACE in os.environ
    try:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        if not workspace_was_set:
            os.environ.pop(CUBLAS_WORKSPACE, None)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_switches


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type

"""The Accelerator of this process, determinism, and the name of its device."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from fastvit_train.distributed import env
from fastvit_train.distributed.preflight import check_devices, check_joined, check_kind, check_precision
from fastvit_train.utils.errors import UserError, counted

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
COLLECTIVE_TIMEOUT = timedelta(hours=3)  # rank 0 may download and decode a data set while the others wait


def start_accelerator(
    grad_accum: int, trackers: tuple[str, ...], run_dir: Path, precision: str | None = None
) -> Accelerator:
    """Start the Accelerator of this process; the world size comes from the launch.

    Args:
        grad_accum: micro-batches per optimizer step.
        trackers: names of trackers to log to.
        run_dir: the run's folder.
        precision: mixed precision; None takes that of the launch. Otherwise call this inside of `own_precision`.

    Raises:
        UserError: if a tracker is not installed, if the launch asks for something that this machine or this trainer
            does not support, or if it asks for more processes than have joined.
    """
    check_kind()
    check_devices()
    check_precision(precision)
    try:
        with env.only_valid():
            accelerator = Accelerator(
                # Without this, each process on a machine without an accelerator would act as if it were the only one.
                cpu=not torch.accelerator.is_available(),
                mixed_precision=precision,
                gradient_accumulation_steps=grad_accum,
                log_with=list(trackers) or None,
                project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir)),
                kwargs_handlers=[InitProcessGroupKwargs(init_method=_init_method(), timeout=COLLECTIVE_TIMEOUT)],
            )
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    check_joined(accelerator.num_processes)
    if accelerator.gradient_accumulation_steps != grad_accum:
        variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        raise UserError(f"{variable}={os.environ[variable]} differs from --grad-accum {grad_accum}; unset it")
    missing = sorted(
        set(trackers) - {tracker if isinstance(tracker, str) else tracker.value for tracker in accelerator.log_with}
    )
    if missing:
        raise UserError(f"--track {' '.join(missing)} is not installed; pip install {' '.join(missing)}")
    return accelerator


def _init_method() -> str | None:
    """Return the URL of the store in which ranks exchange addresses: None for torch's own; a new one after a restart.

    Accelerate's launcher keeps one store for all restarts, which still holds the addresses of the dead processes.
    """
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return None

    def rendezvous_after_restart(url: str, timeout: timedelta, **_: object) -> Iterator[tuple[Store, int, int]]:
        for store, rank, world_size in rendezvous("env://", timeout=timeout):
            yield PrefixStore(f"restart_{restarts}", store), rank, world_size

    with suppress(RuntimeError):  # an earlier run in this process has registered it
        register_rendezvous_handler("restart", rendezvous_after_restart)
    return "restart://"


@contextmanager
def own_precision(precision: str | None) -> Iterator[None]:
    """Let the Accelerator that starts inside of the context have the mixed precision `precision`, if it is not None.

    Accelerate keeps the precision of the first Accelerator for the whole process, and has no public way to change it.
    After the context it is as before, so that a run in a notebook does not decide the precision of the next one.
    """
    if precision is None:
        yield
        return
    state = AcceleratorState._shared_state
    before = dict(state)
    state.clear()
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def leave_process_group() -> None:
    """Leave torch's process group. A command does this last."""
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes > 1:
        # If a thread of gloo drops its last tensor while the interpreter ends, it aborts the process: let it do so now.
        time.sleep(0.1)


@contextmanager
def deterministic() -> Iterator[None]:
    """Make every operator compute the same bits on every run inside the context, and restore torch's switches after it.

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


def emulates_bf16(accelerator: Accelerator) -> bool:
    """Return whether the run computes in bf16 on a CPU that has no instructions for it, which is slower than fp32."""
    return accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and cpu_lacks_bf16()


def cpu_lacks_bf16() -> bool:
    """Return whether the CPU has no instructions for bf16."""
    return torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the kind of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    return device.type

"""How this process fits among the others: the Accelerator, the CPU threads, and what can be wrong with a launch."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from fastvit_train.data.images import local_processes
from fastvit_train.errors import UserError

Result = TypeVar("Result")
WAIT_FOR_FIRST_PROCESS = timedelta(hours=3)  # while it downloads and decodes
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OTHER_KINDS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
FSDP_NEEDS = {
    "FSDP_VERSION": ("fsdp_version", "2"),
    # Loading a sharded one unpickles its metadata, whatever is in it.
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),
}


def start(grad_accum: int, trackers: tuple[str, ...], run_dir: Path) -> Accelerator:
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


def part() -> None:
    """Let go of the other processes; the last thing that a command does."""
    PartialState().destroy_process_group()


def check_kind() -> None:
    """Raise UserError where the launch asks for a kind of training that this trainer doesn't do, or not here."""
    for variable, kind in OTHER_KINDS.items():
        if _says_yes(variable):
            raise UserError(f"{kind} is not served here; allowed are DDP and FSDP2, see accelerate_configs/")
    if not sharded():
        return
    if not torch.accelerator.is_available():  # accelerate would go on with DDP, silently
        raise UserError("FSDP needs GPUs, and there is none; accelerate_configs/multi_cpu.yaml has what a CPU can do")
    for variable, (key, needed) in FSDP_NEEDS.items():
        if os.environ.get(variable, "unset") != needed:
            value = os.environ.get(variable)
            raise UserError(f"{key} {value} is not served; set it to {needed}, as accelerate_configs/fsdp2.yaml does")


def check_devices() -> None:
    """Raise UserError where the launch starts more processes on this machine than it has GPUs."""
    processes, gpus = local_processes(), torch.accelerator.device_count()
    if torch.accelerator.is_available() and processes > gpus:
        raise UserError(
            f"the launch starts {processes} processes on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; allowed: up to {gpus} per machine (--num_processes counts all machines')",
            everywhere=processes == _launched(),  # another machine may have enough
        )


def check_precision() -> None:
    """Raise UserError where the launch asks for a mixed precision that isn't to be had here.

    accelerate would train in fp32 where fp16 is asked for on a CPU, and let a GPU without bf16 emulate it.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if _says_yes("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        where, allowed = "a CPU", ["no", "bf16"]
    elif torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        where, allowed = torch.cuda.get_device_name(), ["no", "fp16"]
    else:
        where, allowed = "this GPU", ["no", "fp16", "bf16"]
    if sharded():
        where, allowed = f"{where} under FSDP", [name for name in allowed if name != "fp16"]
    if asked not in allowed:
        raise UserError(f"mixed precision {asked} can't be had on {where}; allowed: {', '.join(allowed)}")


def check_joined(seen: int) -> None:
    """Raise UserError unless as many processes have joined up, `seen`, as were started and as were asked for."""
    instead = "start them with `accelerate launch --multi_gpu --num_processes N`, on a CPU machine too"
    if _launched() != seen:
        raise UserError(f"the launch started {_launched()} processes, but this one sees {seen}; {instead}")
    asked = _asked_for()
    if asked not in (None, seen):
        raise UserError(
            f"the launch asks for {asked} processes and accelerate started {seen}, as it does for --cpu, MULTI_CPU, "
            f"'NO' and a number that the machines don't divide; {instead}"
        )


def _asked_for() -> int | None:
    """The processes on all machines that accelerate's launcher was told to start; None where it was told no number."""
    words = launcher() or []
    if "launch" not in words:
        return None
    told, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    if told.num_processes is not None or (told.cpu and told.config_file is None):
        return told.num_processes
    try:
        return load_config_from_file(told.config_file).num_processes
    except (OSError, ValueError):
        return None


def check_alone(verb: str) -> None:
    """Raise UserError where the launch started several processes for what one does."""
    if _launched() > 1:
        raise UserError(
            f"{verb} runs in one process, and the launch started {_launched()}; start `python -m fastvit_train {verb}`"
        )


def launcher() -> list[str] | None:
    """The command line of the launcher that this process is a child of, accelerate's or torch's; None without one."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    is_accelerates = under_launcher() and any("accelerate" in word for word in words)
    return words if is_accelerates or "TORCHELASTIC_RUN_ID" in os.environ else None


def sharded() -> bool:
    """True where the launch shards the model over the processes (FSDP)."""
    return _says_yes("ACCELERATE_USE_FSDP")


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _says_yes(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on")


def be_deterministic() -> None:
    """Let every operator give the same bits on every run; one that can't raises RuntimeError when it is called.

    To be called before the GPU is used: cuBLAS reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


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


def first_decides(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action` returns on the first process, on all of them; a UserError there is raised on all."""
    own = everywhere(accelerator, lambda: action() if accelerator.is_main_process else None)
    return cast(Result, broadcast_object_list([own])[0])


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

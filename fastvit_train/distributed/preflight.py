"""Checks before training: they refuse a launch that Accelerate would silently run with other settings."""

from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from fastvit_train.distributed.env import (
    compiles,
    get,
    is_true,
    launched_world_size,
    launcher_command,
    local_world_size,
    uses_fsdp,
)
from fastvit_train.utils.errors import UserError, counted

UNSUPPORTED_KINDS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


FSDP_SETTINGS = {
    "FSDP_VERSION": ("fsdp_version", "2"),
    # A sharded state dict is loaded by unpickling its metadata, which can run any code.
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),
}


def check_kind() -> None:
    """Raise UserError if this trainer, or this machine, does not support the kind of training that was launched."""
    for variable, kind in UNSUPPORTED_KINDS.items():
        if is_true(variable):
            raise UserError(f"{kind} is not supported; allowed are DDP and FSDP2, see accelerate_configs/")
    if not uses_fsdp():
        return
    if not torch.accelerator.is_available():  # Accelerate would silently use DDP
        raise UserError(
            "FSDP needs a GPU, and this machine has none; launch with accelerate_configs/multi_cpu.yaml instead"
        )
    for variable, (key, needed) in FSDP_SETTINGS.items():
        value = get(variable, "")
        if value != needed:
            problem = f"{key} {value} is not supported" if value else f"{key} is not set"
            raise UserError(f"{problem}; set it to {needed}, as accelerate_configs/fsdp2.yaml does")


def check_devices() -> None:
    """Raise UserError if the launch starts more processes on this machine than it has GPUs."""
    processes, gpus = local_world_size(), torch.accelerator.device_count()
    if torch.accelerator.is_available() and processes > gpus:
        raise UserError(
            f"the launch starts {counted(processes, 'process')} on this machine, which has "
            f"{counted(gpus, 'GPU')}; allowed: up to {gpus} per machine "
            "(--num_processes is the number on all machines)",
            on_all_ranks=processes == launched_world_size(),  # another machine may have enough
        )


def check_precision(precision: str | None) -> None:
    """Raise UserError if the mixed precision is not supported here, or if --precision contradicts the launch.

    Accelerate would train in fp32 if fp16 is asked for on a CPU, and let a GPU without bf16 emulate it.

    Args:
        precision: the value of --precision; None for the launch's.
    """
    launched = _launched_precision()
    if precision is not None and launched not in (None, precision):
        raise UserError(
            f"--precision {precision} contradicts the launch, which asks for mixed precision {launched}; "
            "give only one of them"
        )
    asked = precision or launched or "no"
    if is_true("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        where, allowed = "a CPU", ["no", "bf16"]
    elif torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        where, allowed = torch.cuda.get_device_name(), ["no", "fp16"]
    else:
        where, allowed = "this GPU", ["no", "fp16", "bf16"]
    if uses_fsdp():
        where, allowed = f"{where} under FSDP", [name for name in allowed if name != "fp16"]
    if asked not in allowed:
        raise UserError(f"mixed precision {asked} is not supported on {where}; allowed: {', '.join(allowed)}")


def check_joined(world_size: int) -> None:
    """Raise UserError unless `world_size` is what the launcher started and what the user asked for."""
    instead = "start them with `accelerate launch --multi_gpu --num_processes N`, on a CPU machine too"
    if launched_world_size() != world_size:
        raise UserError(
            f"the launch started {counted(launched_world_size(), 'process')}, but this one sees {world_size}; {instead}"
        )
    asked = _requested("num_processes")
    if asked not in (None, world_size):
        raise UserError(
            f"the launch asks for {counted(asked, 'process')}, but accelerate started {world_size}: it ignores the "
            f"number with --cpu, MULTI_CPU and 'NO', and rounds it down to a multiple of the number of machines; "
            f"{instead}"
        )


def _launched_precision() -> str | None:
    """Return the mixed precision that the launch asks for; None if it leaves it open (Accelerate then sets "no")."""
    launched = get("ACCELERATE_MIXED_PRECISION", "").lower() or None
    by_default = launched == "no" and launcher_command() is not None and _requested("mixed_precision") is None
    return None if by_default else launched


def _requested(setting: str) -> Any:
    """Return what the user asked Accelerate's launcher for; None if the user did not give this setting.

    The environment variables of Accelerate 1.10 to 1.15 hold only what the launcher made of it, such as the number of
    processes that it started. So the launcher's command line is read again, with Accelerate's own parser, which handles
    abbreviated flags and the user's default configuration file as the launcher did.
    """
    words = launcher_command() or []
    if "launch" not in words:
        return None
    launch_args, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    given = getattr(launch_args, setting)
    if given is not None or (launch_args.cpu and launch_args.config_file is None):
        return given
    try:
        return getattr(load_config_from_file(launch_args.config_file), setting)
    except (OSError, ValueError):
        return None


def check_single_process(verb: str) -> None:
    """Raise UserError if the launch started several processes for a verb that runs in one."""
    if launched_world_size() > 1:
        raise UserError(
            f"{verb} runs in one process, and the launch started {launched_world_size()}; "
            f"start `python -m fastvit_train {verb}`"
        )


def check_not_launched(verb: str) -> None:
    """Raise UserError if a launcher started `verb`, which starts the processes of its runs itself."""
    if launcher_command() is not None:
        raise UserError(
            f"{verb} starts the processes of its runs itself; start `python -m fastvit_train {verb}`, and give "
            "--precision for mixed precision"
        )


def check_compiled_once(compiled: bool) -> None:
    """Raise UserError if both --compile and the launch compile the model."""
    if compiled and compiles():
        backend = get("ACCELERATE_DYNAMO_BACKEND", "no")
        raise UserError(
            f"--compile and the launch's dynamo backend {backend!r} both compile the model; remove one of them"
        )

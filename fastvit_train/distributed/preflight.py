"""Launches that would run otherwise than asked are refused before anything starts."""

import os

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from fastvit_train.distributed.env import is_true, launched_world_size, launcher_command, local_world_size, uses_fsdp
from fastvit_train.utils.errors import UserError

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


def check_kind() -> None:
    """Raise UserError where the launch asks for a kind of training that this trainer doesn't do, or not here."""
    for variable, kind in OTHER_KINDS.items():
        if is_true(variable):
            raise UserError(f"{kind} is not served here; allowed are DDP and FSDP2, see accelerate_configs/")
    if not uses_fsdp():
        return
    if not torch.accelerator.is_available():  # accelerate would go on with DDP, silently
        raise UserError("FSDP needs GPUs, and there is none; accelerate_configs/multi_cpu.yaml has what a CPU can do")
    for variable, (key, needed) in FSDP_NEEDS.items():
        if os.environ.get(variable, "unset") != needed:
            value = os.environ.get(variable)
            raise UserError(f"{key} {value} is not served; set it to {needed}, as accelerate_configs/fsdp2.yaml does")


def check_devices() -> None:
    """Raise UserError where the launch starts more processes on this machine than it has GPUs."""
    processes, gpus = local_world_size(), torch.accelerator.device_count()
    if torch.accelerator.is_available() and processes > gpus:
        raise UserError(
            f"the launch starts {processes} processes on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; allowed: up to {gpus} per machine (--num_processes counts all machines')",
            on_all_ranks=processes == launched_world_size(),  # another machine may have enough
        )


def check_precision() -> None:
    """Raise UserError where the launch asks for a mixed precision that isn't to be had here.

    accelerate would train in fp32 where fp16 is asked for on a CPU, and let a GPU without bf16 emulate it.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if is_true("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        where, allowed = "a CPU", ["no", "bf16"]
    elif torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        where, allowed = torch.cuda.get_device_name(), ["no", "fp16"]
    else:
        where, allowed = "this GPU", ["no", "fp16", "bf16"]
    if uses_fsdp():
        where, allowed = f"{where} under FSDP", [name for name in allowed if name != "fp16"]
    if asked not in allowed:
        raise UserError(f"mixed precision {asked} can't be had on {where}; allowed: {', '.join(allowed)}")


def check_joined(seen: int) -> None:
    """Raise UserError unless as many processes have joined up, `seen`, as were started and as were asked for."""
    instead = "start them with `accelerate launch --multi_gpu --num_processes N`, on a CPU machine too"
    if launched_world_size() != seen:
        raise UserError(f"the launch started {launched_world_size()} processes, but this one sees {seen}; {instead}")
    asked = _asked_for()
    if asked not in (None, seen):
        raise UserError(
            f"the launch asks for {asked} processes and accelerate started {seen}, as it does for --cpu, MULTI_CPU, "
            f"'NO' and a number that the machines don't divide; {instead}"
        )


def _asked_for() -> int | None:
    """The processes on all machines that accelerate's launcher was told to start; None where it was told no number."""
    words = launcher_command() or []
    if "launch" not in words:
        return None
    told, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    if told.num_processes is not None or (told.cpu and told.config_file is None):
        return told.num_processes
    try:
        return load_config_from_file(told.config_file).num_processes
    except (OSError, ValueError):
        return None


def check_single_process(verb: str) -> None:
    """Raise UserError where the launch started several processes for what one does."""
    if launched_world_size() > 1:
        raise UserError(
            f"{verb} runs in one process, and the launch started {launched_world_size()}; "
            f"start `python -m fastvit_train {verb}`"
        )


def check_compiled_once(compiled: bool) -> None:
    """Raise UserError where --compile meets a launch that compiles the model too."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if compiled and backend.upper() != "NO":
        raise UserError(f"--compile and the launch's dynamo backend {backend!r} both compile the model; leave one out")

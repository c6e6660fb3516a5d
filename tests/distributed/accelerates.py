"""What accelerate's launcher makes of its flags and files, without starting anything."""

import os
from types import SimpleNamespace

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env


def launched_with(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """Give this process the parent and the variables that `accelerate launch FLAGS` gives each of those it starts."""
    words = [*map(str, flags), "train.py"]
    launcher = SimpleNamespace(cmdline=lambda: ["python", "accelerate", "launch", *words])
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: launcher))
    args = launch_command_parser().parse_args(words)
    args, _, _ = _validate_launch_command(args)
    through_torchrun = (args.multi_gpu or args.use_fsdp) and not args.cpu
    given = prepare_multi_gpu_env(args) if through_torchrun else prepare_simple_launcher_cmd_env(args)[1]
    for name, value in given.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)

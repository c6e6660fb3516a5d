"""What the launcher wrote into the environment; without torch, so that the command line can import it quickly."""

import os

import psutil


def launcher_command() -> list[str] | None:
    """The command line of the launcher that started this process, Accelerate's or torch's; None without a launcher."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    by_accelerate = under_launcher() and any("accelerate" in word for word in words)
    return words if by_accelerate or under_torchelastic() else None


def under_launcher() -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def under_torchelastic() -> bool:
    """Whether torch's elastic agent (torchrun, or Accelerate's launcher for several ranks) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def uses_fsdp() -> bool:
    """Whether the launch shards the model over the ranks."""
    return is_true("ACCELERATE_USE_FSDP")


def is_true(variable: str) -> bool:
    """Whether an environment variable is set to a word that means true."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on")


def is_rank0() -> bool:
    """Whether this process is rank 0; works before there is an Accelerator."""
    return int(os.environ.get("RANK", 0)) == 0


def launched_world_size() -> int:
    """Number of processes that the launcher started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Number of processes that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

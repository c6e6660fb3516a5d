"""What launchers and others wrote into the environment; without torch, so that the command line can import it quickly.

Nothing here trusts a variable: an empty one counts as unset, and so does one whose value cannot be valid.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

log = logging.getLogger(__name__)
RANKS = re.compile(
    r"(LOCAL_|GROUP_)?RANK|(MV2|OMPI)_COMM_WORLD_(LOCAL_)?RANK|PMI_RANK|MPI_LOCALRANKID|TORCHELASTIC_RESTART_COUNT"
)
SIZES = re.compile(r"(LOCAL_)?WORLD_SIZE|(MV2|OMPI)_COMM_WORLD_(LOCAL_)?SIZE|PMI_SIZE|MPI_LOCALNRANKS|MASTER_PORT")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_")
"""beginnings of the names of variables that launchers set"""
MATPLOTLIB_BACKEND = "MPLBACKEND"
MEANS_UNSET = ("", "-1")
"""values with which scripts say that a variable has no value"""


@contextmanager
def only_valid() -> Iterator[None]:
    """Hide environment variables from all libraries that could not read them, inside the context.

    A notebook's MPLBACKEND, for one, is inherited by the programs that it starts, where it may name a module that is
    not installed. It is of no use here, because we write pictures into files only.
    """
    imported = "matplotlib" in sys.modules
    before = {name: value for name, value in os.environ.items() if _read(name, value) != value}
    for name, value in before.items():
        del os.environ[name]
        if valid := _read(name, value):
            os.environ[name] = valid
        elif value.strip() not in MEANS_UNSET and name != MATPLOTLIB_BACKEND:
            log.warning("%s=%.100s in the environment is not a number that %s can have: ignored", name, value, name)
    try:
        yield
    finally:
        os.environ.update(before)
        if MATPLOTLIB_BACKEND in before and not imported and "matplotlib" in sys.modules:
            with suppress(ValueError):  # as matplotlib itself would have read it
                sys.modules["matplotlib"].rcParams["backend"] = before[MATPLOTLIB_BACKEND]


def _read(name: str, value: str) -> str | None:
    """Return the value of a variable in the form that all libraries read, or None if it counts as unset."""
    if RANKS.fullmatch(name):
        return value if value.isdecimal() else None
    if SIZES.fullmatch(name):
        return value if value.isdecimal() and int(value) > 0 else None
    if name == MATPLOTLIB_BACKEND:
        return None
    if name in THREADS:  # OpenMP takes a list too, one number for each level of nesting
        first = value.partition(",")[0].strip()
        return first if first.isdecimal() and int(first) > 0 else None
    return value if value.strip() or not name.startswith(OF_LAUNCHERS) else None


def get(variable: str, default: str) -> str:
    """Return the value of an environment variable, or `default` if it counts as unset."""
    value = _read(variable, os.environ.get(variable, ""))
    return value or default


def has_thread_count(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment sets the number of CPU threads."""
    return any(_read(name, environ.get(name, "")) for name in THREADS)


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


def compiles() -> bool:
    """Whether the launch compiles the model, by its dynamo backend."""
    return get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def is_true(variable: str) -> bool:
    """Whether an environment variable is set to a word that means true."""
    return get(variable, "false").lower() in ("1", "true", "yes", "y", "on")


def is_rank0() -> bool:
    """Whether this process is rank 0; works before there is an Accelerator."""
    return launched_world_size() == 1 or get("RANK", "0") == "0"


def launched_world_size() -> int:
    """Number of processes that the launcher started, on all machines."""
    return int(get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes that the launcher started on this machine."""
    return int(get("LOCAL_WORLD_SIZE", "1"))

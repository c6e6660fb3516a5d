"""`python -m tests.support.other_systems SYSTEM DATA RUNS` uses the program as on Windows or macOS, as far as possible.

The libraries are imported first, so that they stay those of Linux. Then this takes away what Python or the file system
lacks there, and sets `sys.platform`. Paths, the console and the libraries remain those of Linux.
"""

import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil

MISSING: dict[str, dict[Any, tuple[str, ...]]] = {
    "win32": {
        os: ("fork", "sched_getaffinity", "getuid", "geteuid", "killpg", "mkfifo", "statvfs", "O_DIRECTORY"),
        signal: ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGALRM", "pthread_sigmask", "sigwaitinfo"),
    },
    "darwin": {os: ("sched_getaffinity",), signal: ("sigwaitinfo", "sigtimedwait")},
}
MISSING_MODULES = {"win32": ("fcntl", "resource", "pwd", "grp", "termios"), "darwin": ()}
START_METHODS = {"win32": ["spawn"], "darwin": ["spawn", "fork", "forkserver"]}
LIBRARIES = (
    *("accelerate", "matplotlib.backends.backend_agg", "optuna.storages.journal", "timm", "torchvision"),
    *("torch._dynamo", "torch.utils.data", "accelerate.commands.launch", "torch.distributed.run"),
)
OF_LINUX = ("/proc", "/dev/shm", "/sys")


def pretend(system: str) -> None:
    """Let this process see another system from now on."""
    for module, names in MISSING[system].items():
        for name in names:
            delattr(module, name)
    for name in MISSING_MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    multiprocessing.get_all_start_methods = lambda: START_METHODS[system]  # type: ignore[method-assign]
    os.open, os.stat = _without_linux(os.open), _without_linux(os.stat)
    if system == "win32":
        shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as where folders can't be opened
        psutil.Process.memory_info = _with_peak(psutil.Process.memory_info)  # type: ignore[method-assign]
        os.open, os.replace, os.symlink = _not_folders(os.open, 0), _not_folders(os.replace, 1), _refuse_link
    sys.platform = system


def _without_linux(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the paths that only Linux has."""

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(OF_LINUX):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return function(path, *args, **kwargs)

    return call


def _not_folders(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """The function, which refuses a folder, or a link to one, as the argument at `position`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(args[position]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[position])
        return function(*args, **kwargs)

    return call


def _with_peak(memory_info: Callable[..., Any]) -> Callable[..., Any]:
    """psutil's function with the field that it has on Windows alone."""

    def call(process: psutil.Process) -> SimpleNamespace:
        resident = memory_info(process).rss
        return SimpleNamespace(rss=resident, peak_wset=resident)

    return call


def _refuse_link(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EINVAL, "A required privilege is not held by the client")  # what Python makes of WinError 1314


def use(data: str, runs: str) -> None:
    """Train on streamed images, resume, use most of the verbs, and search."""
    from fastvit_train.cli.main import main
    from fastvit_train.data import images

    images.MAX_WITHOUT_WORKERS = 0
    flags = "--epochs 2 --batch-size 8 --embed-dim 16 --depth 1 --num-heads 2 --patch-size 8 --optimizer nmuon"
    settings = ["--dataset", "folder", "--data-dir", data, "--runs-dir", runs, *flags.split()]
    settings += ["--attention", "auto" if sys.platform == "win32" else "fused"]  # auto compiles nothing on Windows
    train = ["train", *settings, "--exp-name", "run", "--stream", "always", "--mlp-ratio", "2"]
    main([*train, "--stop-after", "1"])
    main([*train, "--resume", "must"])
    for verb in ("eval", "inspect", "report"):
        main([verb, f"{runs}/run"])
    main(["predict", f"{runs}/run", f"{data}/test/circle/0.png"])
    main(["sweep", "lr=1e-3..1e-2", *settings, "--holdout", "0.2", "--trials", "1"])


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    pretend(sys.argv[1])
    use(*sys.argv[2:])

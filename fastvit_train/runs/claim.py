"""The name and the lock of a run's folder, on which all ranks agree."""

from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import sync
from fastvit_train.runs.lock import LockedError
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.runs.run_names import default_name, find_run, free_names


def choose_name(given: TrainConfig, config: ResolvedConfig, accelerator: Accelerator, find: bool) -> ResolvedConfig:
    """Return `config` with the name of the run; a default name has a number if it is in use. Nothing is written.

    Args:
        given: the settings as the user wrote them.
        config: the same settings, resolved.
        accelerator: all ranks take the name that rank 0 chooses.
        find: choose a run that exists, to resume or overwrite it, if there is one.
    """
    if given.run.exp_name is not None:
        return config
    runs_dir, name = Path(config.run.runs_dir), default_name(config.settings)

    def choose() -> str:
        found = find_run(config.settings, name) if find else None
        return found or next(iter(free_names(runs_dir, name)))

    return config.with_name(sync.broadcast_from_rank0(accelerator, choose))


def lock_run(
    config: ResolvedConfig, accelerator: Accelerator, stack: ExitStack, may_rename: bool
) -> tuple[ResolvedConfig, list[str]]:
    """Lock the run's folder on rank 0 until `stack` closes.

    Args:
        config: the run's configuration.
        accelerator: the Accelerator, whose trackers will log into the folder.
        stack: releases the lock.
        may_rename: if another run has taken the name meanwhile, take the next one.

    Returns:
        The configuration, and messages about a lock that a dead process left.

    Raises:
        UserError: if another process holds the lock, or if the folder cannot be written.
    """
    runs_dir, names = Path(config.run.runs_dir), [str(config.run.exp_name)]

    def lock() -> tuple[str, list[str]]:
        for name in free_names(runs_dir, default_name(config.settings)) if may_rename else names:
            folder = RunFolder(runs_dir / name)
            try:
                held, messages = folder.acquire_lock()
            except LockedError:
                if not may_rename:
                    raise
                continue
            stack.callback(held.release)
            if not may_rename or folder.is_unused():
                return name, messages
            held.release()
        raise AssertionError("free_names does not end")

    name, messages = sync.broadcast_from_rank0(accelerator, lock)
    config = config.with_name(name)
    directories = accelerator.project_configuration
    directories.project_dir = directories.logging_dir = str(config.run_dir)
    return config, messages

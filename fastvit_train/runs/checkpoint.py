"""Checkpoints between optimizer steps: written completely or not at all, and checked when they are loaded."""

import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from fastvit_train import __version__
from fastvit_train.config.settings_file import upgrade_hint
from fastvit_train.distributed import sync
from fastvit_train.runs.train_state import TrainState
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError, UserError
from fastvit_train.utils.safe_load import read_json

PROGRESS_FILE = "progress.json"
LINKS = ("last", "best")
"""names that stand for a checkpoint, as `atomic_io.link` makes them"""


def save(
    folder: Path,
    accelerator: Accelerator,
    optimizer: Optimizer,
    state: TrainState,
    data: dict[str, object],
    keep: int = 2,
) -> None:
    """Write step_N into `folder`, link `last` (and `best`) to it, and remove all but the newest `keep` and the best.

    Raises:
        SaveError: on all ranks, if one of them could not write.
    """
    name = f"step_{state.step}"
    partial, is_main = folder / f".{name}.partial", accelerator.is_main_process
    saved = {
        "version": __version__,
        "progress": asdict(state),
        "learning_rates": _learning_rates(optimizer),
        "optimizer_steps": _optimizer_steps(optimizer),
        "cpu_rng": accelerator.gather(_cpu_rng().to(accelerator.device)).tolist(),
        "gpu_rng": accelerator.gather(_gpu_rng().to(accelerator.device)).tolist()
        if torch.cuda.is_available()
        else None,
        "mixed_precision": accelerator.mixed_precision,
        "data": data,
    }

    def publish() -> None:
        (partial / PROGRESS_FILE).write_text(json.dumps(saved), encoding="utf-8")
        atomic_io.write_checksums(partial)
        atomic_io.publish_folder(partial, folder / name)
        atomic_io.link(folder / "last", name)
        if state.best_step == state.step:
            atomic_io.link(folder / "best", name)
        _prune(folder, keep)

    def write(action: Callable[[], Any]) -> None:
        with atomic_io.as_save_error(f"no checkpoint could be written into {folder}"):
            action()

    try:
        for action in (
            lambda: _make_empty(partial) if is_main else None,
            lambda: accelerator.save_state(str(partial)),
            lambda: publish() if is_main else None,
        ):
            sync.run_on_all_ranks(accelerator, functools.partial(write, action))
    except SaveError:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def exists(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from."""
    return bool(by_step(folder)) or any(folder.glob(".step_*.old"))


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, damaged or not; None if there is none."""
    return next(iter(_newest_first(folder)), None)


def by_step(folder: Path) -> dict[int, Path]:
    """Return the checkpoints by step, damaged or not; a copy in place of a link counts if there is no other."""
    copies = {int(original.name[5:]): copy for copy, original in _copies(folder).items()}
    paths = (path for path in folder.glob("step_*") if path.name[5:].isdecimal() and path.is_dir())
    return {**copies, **{int(path.name[5:]): path for path in paths}}


def _newest_first(folder: Path) -> list[Path]:
    steps = {step: path for step, path in by_step(folder).items() if path.name not in LINKS}
    return [steps[step] for step in sorted(steps, reverse=True)]


def load(
    folder: Path,
    accelerator: Accelerator,
    optimizer: Optimizer,
    data: dict[str, object],
    check: Callable[[Path, Accelerator], None],
) -> tuple[TrainState, list[str]]:
    """Load the newest undamaged checkpoint into everything that was prepared; call it on all ranks.

    Args:
        folder: the folder of the checkpoints.
        accelerator, optimizer: what is restored; the optimizer is not wrapped by Accelerate.
        data: identity of the data set, which must equal that in the checkpoint.
        check: raises UserError if this launch cannot load the checkpoint that it is given.

    Returns:
        The state of the run, and messages about newer checkpoints that are damaged.

    Raises:
        UserError: on all ranks, if every checkpoint is damaged, if the data or the mixed precision have changed, or if
            the random state, the optimizer or the schedule differ from what was saved.
    """
    path, problems = sync.broadcast_from_rank0(accelerator, lambda: _newest_undamaged(folder))
    if path is None:
        raise UserError(
            f"{folder} has no checkpoint that can be loaded: {'; '.join(problems)}; start over with --overwrite"
        )
    sync.run_on_all_ranks(accelerator, lambda: check(path, accelerator))
    state = sync.run_on_all_ranks(accelerator, lambda: _restore(path, accelerator, optimizer, data))
    return state, [f"{problem}: continuing from {path.name}" for problem in problems]


def _restore(path: Path, accelerator: Accelerator, optimizer: Optimizer, data: dict[str, object]) -> TrainState:
    remedy = "start over with --overwrite"
    try:
        saved = read_json(path / PROGRESS_FILE)
        remedy = upgrade_hint(saved.get("version")) or remedy
        state = TrainState(**saved["progress"])
        _check_same(path, saved, accelerator, data)
        with warnings.catch_warnings(action="ignore"):  # torch warns of files that it did not write itself
            accelerator.load_state(str(path))
        _check_restored(saved, accelerator, optimizer)
        return state
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything in torch's reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} can't be read ({reason}); {remedy}") from None


def _check_restored(saved: dict[str, Any], accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Raise ValueError unless the random state, the schedule and the optimizer were restored as they were saved."""
    for name, fingerprint in (("cpu_rng", _cpu_rng), ("gpu_rng", _gpu_rng if torch.cuda.is_available() else None)):
        before = saved.get(name)  # None on the other kind of device, and in checkpoints up to version 0.2.0
        if before is None or fingerprint is None or len(before) != accelerator.num_processes:
            continue
        if int(fingerprint()) != before[accelerator.process_index]:
            raise ValueError("the random state was not restored")
    if _learning_rates(optimizer) != saved["learning_rates"]:
        raise ValueError("the learning rates were not restored")
    if _optimizer_steps(optimizer) != saved["optimizer_steps"]:
        raise ValueError("the state of the optimizer was not restored")


def _newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes its checksums, and what is wrong with the newer ones."""
    atomic_io.recover_interrupted(folder)
    _adopt_copies(folder)
    problems: list[str] = []
    for path in _newest_first(folder):
        damage = _find_damage(path)
        if damage is None:
            return path, problems
        problems.append(f"checkpoint {path.name} is damaged ({damage})")
    return None, problems or ["there is no checkpoint"]


def _find_damage(path: Path) -> str | None:
    try:
        return atomic_io.find_damage(path)
    except OSError as error:
        raise UserError(f"checkpoint {path} can't be read now ({error.strerror}); try again") from None


def _copies(folder: Path) -> dict[Path, Path]:
    """Return the checkpoints in place of links, left by a copy that followed them: each with its path under step_N."""
    copies = {}
    for path in (folder / name for name in LINKS):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError, ValueError, LookupError, TypeError):  # not a checkpoint, or a damaged one
                copies[path] = folder / f"step_{int(read_json(path / PROGRESS_FILE)['progress']['step'])}"
    return copies


def _adopt_copies(folder: Path) -> None:
    """Make links again of the checkpoints in place of links; one whose original is damaged or missing replaces it."""
    for copy, original in _copies(folder).items():
        if _find_damage(original) is not None:
            if _find_damage(copy) is not None:
                continue
            atomic_io.publish_folder(copy, original)
        atomic_io.link(copy, original.name)


def drop_after(folder: Path, state: TrainState, keep: int) -> None:
    """Remove the checkpoints after `state`, which the resumed run writes again, and finish what `save` may not have."""
    for path in _newest_first(folder):
        if int(path.name[5:]) > state.step:
            shutil.rmtree(path)
    atomic_io.link(folder / "last", f"step_{state.step}")
    best = f"step_{state.best_step}"
    if (folder / best).is_dir():
        atomic_io.link(folder / "best", best)
    elif atomic_io.link_target(folder / "best") is None:  # otherwise it is the best one that could be written
        atomic_io.remove(folder / "best")
    _prune(folder, keep)


def _check_same(path: Path, saved: dict[str, Any], accelerator: Accelerator, data: dict[str, object]) -> None:
    before = {**data, **saved["data"]}  # a version that did not record a key yet
    changed = [f"{key}: {before[key]} -> {data[key]}" for key in data if before[key] != data[key]]
    if changed:
        raise UserError(
            f"{path} was trained on other data ({'; '.join(changed)}); "
            "restore the data, or start another run with --exp-name"
        )
    if saved["mixed_precision"] != accelerator.mixed_precision:
        before, now = saved["mixed_precision"], accelerator.mixed_precision
        raise UserError(
            f"{path} was trained with mixed precision {before!r}, and this run has {now!r}; "
            f"resume with --precision {before}"
        )


def _cpu_rng() -> torch.Tensor:
    """Return a hash of the state of torch's generator for the CPU, int64 (1,)."""
    return _hash(torch.get_rng_state())


def _gpu_rng() -> torch.Tensor:
    """Return a hash of the state of torch's generator for this rank's GPU, int64 (1,)."""
    return _hash(torch.cuda.get_rng_state())


def _hash(state: torch.Tensor) -> torch.Tensor:
    return torch.tensor([int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=7).digest())])


def _learning_rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _optimizer_steps(optimizer: Optimizer) -> list[float]:
    """Return the step counts in the optimizer's state; they are below the run's step if fp16 skipped some."""
    return sorted({float(state["step"]) for state in optimizer.state.values() if "step" in state})


def _prune(folder: Path, keep: int) -> None:
    kept = {atomic_io.link_target(folder / link) for link in LINKS}
    for path in _newest_first(folder)[keep:]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)  # a file that another process has open is removed next time

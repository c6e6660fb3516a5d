"""The trials of a sweep: each is a run of its own, in a process of its own; optuna chooses their settings."""

import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from fastvit_train.config import settings_file
from fastvit_train.config.overrides import marked, override, to_plain
from fastvit_train.config.schema import TrainConfig
from fastvit_train.config.validation import Mark
from fastvit_train.runs.lock import LockedError, RunLock
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.training.sweep.results import RUN, shown, write_results
from fastvit_train.training.sweep.space import parse
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.safe_load import read_json

JOURNAL, LOCK, ERRORS = "sweep.journal", ".sweep.lock", "errors"
ERROR = "fastvit_train: error: "
"""begins the line with which a run fails"""
DIVERGED, NOT_FINITE = "diverged", re.compile(r"the loss became|is NaN or inf after step")
"""the attribute of a trial whose loss or weights became NaN or inf, and what its run says then"""
POLL_SECONDS = 0.2
FIRST_UNPRUNED = 5
"""trials that are trained to their end before any is stopped early"""
UNPRUNED_PART = 1 / 3
"""part of the epochs that each trial is trained for, since a rate that is best in the end may be slow to begin with"""


def sweep(config: TrainConfig, words: Sequence[str], trials: int, name: str, prune: bool) -> None:
    """Search for the settings with the highest accuracy on held-out training images.

    The folder `runs_dir/name` holds a run per trial, and what is known of the trials. If the sweep was stopped, it is
    continued, trials under way included. The same command in several processes at once shares the trials out.

    Args:
        config: the settings that all trials have in common.
        words: what to search, see `space.parse`.
        trials: how many in all.
        name: of the sweep's folder.
        prune: stop trials that after a third of their epochs or later are below the median of the others after the same
            epoch.

    Raises:
        UserError: if the search is not valid, if nothing is held out, if the folder holds another sweep, if the first
            trial fails for another reason than a loss that is NaN or inf, or if no trial is finished.
    """
    if not config.data.holdout:
        raise UserError("a sweep chooses on held-out training images, never on the test set; give --holdout 0.1")
    space = parse(words, config)
    folder = Path(config.run.runs_dir) / name
    study = _open(folder, config, words, prune)
    console = Terminal()
    while (started := _start_trial(study, space, folder, trials, config.run.seed)) is not None:
        trial, claim = started
        try:
            with claim:
                _run(study, trial, config, folder, console)
        except UserError:
            _remove_if_nothing_began(study, folder)
            raise
    console.print(write_results(study.get_trials(), folder), markup=False, soft_wrap=True)
    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.RUNNING]):
        raise UserError(f"no trial of {folder} was finished; search other values, under another --name")


def _open(folder: Path, config: TrainConfig, words: Sequence[str], prune: bool) -> optuna.Study:
    """Open the study in `folder`, or create it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path for path in folder.iterdir() if path.name != LOCK]  # another process may have begun to open it
        if others and not (folder / JOURNAL).exists():
            raise UserError(f"{folder} holds something else than a sweep; give another --name")
    except OSError as error:
        raise UserError(f"can't write {folder} ({error.strerror or error}); choose another --runs-dir") from None
    epochs = math.ceil(config.run.total_epochs * UNPRUNED_PART)
    journal = str(folder / JOURNAL)
    without_links = JournalFileOpenLock(journal)  # optuna's default is a symbolic link, which Windows reserves for few
    with FileLock(folder / LOCK):
        study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(journal, without_links)),
            sampler=_sampler(config.run.seed),
            pruner=optuna.pruners.MedianPruner(FIRST_UNPRUNED, epochs) if prune else optuna.pruners.NopPruner(),
            direction="maximize",
            load_if_exists=True,
        )
        settings = {key: value for key, value in to_plain(config).items() if key not in marked(Mark.MAY_CHANGE)}
        recorded = {"search": sorted(words), "settings": settings}
        if study.user_attrs not in ({}, recorded):
            raise UserError(f"{folder} holds a sweep with another search or other settings; give another --name")
        for key, value in recorded.items():
            study.set_user_attr(key, value)
    return study


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _start_trial(
    study: optuna.Study, space: dict[str, BaseDistribution], folder: Path, trials: int, seed: int
) -> tuple[Trial, AbstractContextManager[object]] | None:
    """Choose the next trial and claim it for this process; None if there are enough."""
    with FileLock(folder / LOCK):
        for abandoned in _abandoned(study, folder):
            study.enqueue_trial(abandoned.params, abandoned.user_attrs)  # the same run, which is resumed
            study.tell(abandoned.number, state=TrialState.FAIL)
        runs = {trial.user_attrs[RUN] for trial in study.get_trials(deepcopy=False) if RUN in trial.user_attrs}
        waiting = study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        if len(runs) >= trials and not waiting:
            return None
        # Each process and each start would else draw the same first random settings.
        study.sampler = _sampler(seed + len(study.get_trials(deepcopy=False)))
        trial = study.ask(space)
        if RUN not in trial.user_attrs:
            trial.set_user_attr(RUN, f"trial-{len(runs) + 1:04d}")
        return trial, _claim(folder, trial.user_attrs[RUN]).acquire()


def _remove_if_nothing_began(study: optuna.Study, folder: Path) -> None:
    """Remove the sweep if the training of no trial has begun, so that the corrected command can take its name."""

    def began(trial: FrozenTrial) -> bool:
        attributes = trial.user_attrs
        return DIVERGED in attributes or (RUN in attributes and (folder / attributes[RUN]).exists())

    with FileLock(folder / LOCK):
        trials = study.get_trials(deepcopy=False)
        if all(trial.state == TrialState.FAIL and not began(trial) for trial in trials):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(study: optuna.Study, folder: Path) -> list[FrozenTrial]:
    """Return the trials that no process is training although they have begun; the caller holds the sweep's lock.

    A sweep that is killed cannot stop the training of its trial, which then holds the lock of the run.
    """
    begun = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    found = [trial for trial in begun if RUN not in trial.user_attrs]  # its process was killed before it had a name
    for trial in begun:
        if trial not in found:
            run = trial.user_attrs[RUN]
            with suppress(Timeout, LockedError), _claim(folder, run).acquire(blocking=False):
                RunLock(folder / run).check_free()
                found.append(trial)
    return found


def _claim(folder: Path, run: str) -> FileLock:
    return FileLock(folder / f".{run}.lock")


def _run(study: optuna.Study, trial: Trial, config: TrainConfig, folder: Path, console: Terminal) -> None:
    """Train a trial, and tell the study its accuracy."""
    run, searched = trial.user_attrs[RUN], " ".join(f"{key}={shown(value)}" for key, value in trial.params.items())
    own = override(config, {**trial.params, "runs_dir": str(folder), "exp_name": run}, "the sweep")
    with tempfile.TemporaryDirectory() as temporary:
        with _training(own, Path(temporary)) as process:
            pruned = _watch(process, trial, RunFolder(folder / run))
        errors = (Path(temporary) / ERRORS).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        result = "stopped early"
    elif process.returncode:
        said = [line for line in errors if line.startswith(ERROR)] or errors
        reason = said[-1] if said else f"exit status {process.returncode}"
        if diverged := NOT_FINITE.search(reason):
            trial.set_user_attr(DIVERGED, True)
        study.tell(trial, state=TrialState.FAIL)
        if not diverged and not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            raise UserError(f"{run} ({searched}) failed: {reason.removeprefix(ERROR)}")
        result = f"failed: {reason}"
    else:
        accuracy = float(read_json(folder / run / "summary.json")["test_accuracy"])
        study.tell(trial, accuracy)
        result = f"accuracy {accuracy:.2%}, best {study.best_value:.2%} ({study.best_trial.user_attrs[RUN]})"
    console.print(f"{run}: {searched}  {result}", markup=False, soft_wrap=True)


@contextmanager
def _training(config: TrainConfig, temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Train in another process; if this one is interrupted, the other writes a checkpoint and ends too."""
    file = temporary / "trial.yaml"
    file.write_text(settings_file.to_file(config), encoding="utf-8")
    command = [sys.executable, "-m", "fastvit_train", "--config", str(file), "--resume", "auto"]
    with open(temporary / ERRORS, "wb") as errors, _as_ctrl_c():
        # In a session of its own: Ctrl-C in a terminal would reach the trial too, and the SIGTERM from here, its second
        # signal, would end it without a checkpoint.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a trial write a checkpoint and end, unless it has ended; an interrupt in the meantime ends it at once."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that no trial outlives its sweep; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    # What nohup ignores stays ignored.
    caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(process: subprocess.Popen[bytes], trial: Trial, run: RunFolder) -> bool:
    """Report the accuracy after each epoch until the process ends; returns whether the trial is to be stopped early."""
    reported = 0
    while True:
        ended = process.poll() is not None
        rows = read_jsonl(run.metrics)[reported:]
        for row in rows:
            trial.report(row["test_accuracy"], row["epoch"])
        reported += len(rows)
        if ended:
            return False
        if rows and trial.should_prune():
            return True
        time.sleep(POLL_SECONDS)

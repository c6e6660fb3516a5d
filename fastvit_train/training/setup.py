"""Everything that a training run needs, built stage by stage and checked before anything is written."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import check_files
from fastvit_train.data.inputs import build_eval_loader, build_train_loader, load_data
from fastvit_train.data.loader import RankInfo, check_batch_size, fit_batch_size
from fastvit_train.distributed import env, parallelize, preflight, sync
from fastvit_train.distributed.accelerator import deterministic, own_precision, start_accelerator
from fastvit_train.distributed.cpu_threads import all_cores
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.models.attention import AUTO, check_attention
from fastvit_train.models.blocks import check_block
from fastvit_train.models.compiling import check_compiler
from fastvit_train.models.resolve import resolve
from fastvit_train.models.whitening import whiten
from fastvit_train.runs import checkpoint
from fastvit_train.runs.claim import choose_name, lock_run
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.log import Log, MetricsBuffer
from fastvit_train.runs.run_folder import ResumeMode, RunFolder
from fastvit_train.runs.train_state import TrainState
from fastvit_train.training.fit_memory import check_fit_memory, fit_in_memory
from fastvit_train.training.graphed_step import record_steps
from fastvit_train.training.metrics import log_introduction
from fastvit_train.training.optim.loss import build_loss
from fastvit_train.training.preemption import StatusExchange, StopSignalHandler
from fastvit_train.training.prepare import (
    Inputs,
    Trained,
    build_trainable,
    prepare,
    resolve_implementations,
    take_first_passes,
)
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.gpu_monitor import Meter
from fastvit_train.utils.machine import OtherProcesses
from fastvit_train.utils.timing import SlowdownDetector


@dataclass(frozen=True)
class Launch:
    """This process's place in the launch, and its log."""

    accelerator: Accelerator
    log: Log
    threads: str
    """the CPU threads, in words"""


@dataclass(frozen=True)
class Ready:
    """A run that is ready to train, but for the recording of its step; and what its log begins with."""

    session: TrainSession
    inputs: Inputs
    whole_step: bool
    """whether the step is to be recorded"""
    threads: str
    resuming: bool
    messages: list[str]


def setup(
    config: TrainConfig,
    resume: ResumeMode,
    overwrite: bool,
    stop_signals: StopSignalHandler | None = None,
    imitate_data: bool = False,
) -> TrainSession:
    """Build the run that `config` describes, or restore it if it is to be resumed.

    Args:
        config, resume, overwrite: as in `fit`.
        stop_signals: notes signals that ask the run to stop; by default nothing does.
        imitate_data: use synthetic images of the same shape and number if the data set would have to be downloaded.

    Returns:
        The session; the caller closes it.

    Raises:
        UserError: if something is wrong with the settings, the data, the launch or the run's folder.
    """
    return setup_together([config], resume, overwrite, RandomStates(1), stop_signals, imitate_data)[0]


def setup_together(
    configs: Sequence[TrainConfig],
    resume: ResumeMode,
    overwrite: bool,
    random_states: RandomStates,
    stop_signals: StopSignalHandler | None = None,
    imitate_data: bool = False,
) -> list[TrainSession]:
    """Build the runs that `configs` describe as `setup` does, for training together.

    Args:
        configs: settings that differ in seed and exp_name only.
        resume, overwrite, stop_signals, imitate_data: as in `setup`.
        random_states: those of the runs.

    Returns:
        The sessions, which share the images. To close one of them is to close all.

    Raises:
        UserError: as `setup`; or if runs that are resumed have not taken the same number of steps.
    """
    with ExitStack() as stack:
        runs: list[Ready] = []
        for index, config in enumerate(configs):
            random_states.switch_to(index)
            shared = runs[0].inputs if runs else None
            runs.append(set_up(config, resume, overwrite, stop_signals, imitate_data, shared, stack))
        if len(runs) > 1:
            check_same_step(runs)
            share_terminal(runs)
        sessions, messages = record_or_warm_up(runs, random_states)
        for run, session in zip(runs, sessions, strict=True):
            log_introduction(session, run.threads, run.resuming, run.messages + messages)
        resources = stack.pop_all()
        return [replace(session, resources=resources) for session in sessions]


def set_up(
    config: TrainConfig,
    resume: ResumeMode,
    overwrite: bool,
    stop_signals: StopSignalHandler | None,
    imitate_data: bool,
    shared: Inputs | None,
    stack: ExitStack,
) -> Ready:
    """Build one run, up to the recording of its step; `stack` releases what this opens.

    Args:
        config, resume, overwrite, stop_signals, imitate_data: as in `setup`.
        shared: inputs of another run on the same images; by default they are loaded.
        stack: if it ends with an error, it also removes the run's folder, unless the run can be resumed.
    """
    resolved = resolve(config)
    launch = start_launch(resolved, stack)
    resolved = choose_name(config, resolved, launch.accelerator, find=overwrite or resume != "never")
    folder = RunFolder(resolved.run_dir)
    try:
        resolved, resuming = check_folder(resolved, folder, launch, resume, overwrite)
    except UserError:
        check_files(resolved.data)  # a mistake in the data is reported before that in the run's name
        raise
    # Before the data: a wrong size is reported before a download. A checkpoint replaces what --weights would load.
    model, optimizer = build_trainable(resolved.with_model(weights=None) if resuming else resolved)
    inputs = shared.with_seed(resolved.run.seed) if shared else load_inputs(resolved, launch.accelerator, imitate_data)
    if resolved.model.patch_init == "whiten" and not resuming:
        whiten(model, resolved, inputs.dataset)
    set_seed(resolved.run.seed, device_specific=True)  # dropout must differ between ranks, weights must not
    resolved, messages = resolve_implementations(resolved, model, inputs, launch.accelerator)
    if resolved.run.fit_memory and not resuming:
        resolved, inputs, found = fit_in_memory(resolved, model, inputs, launch.accelerator)
        messages += found
    launch.accelerator.gradient_accumulation_steps = resolved.optim.grad_accum
    trained = prepare(resolved, model, optimizer, inputs, launch.accelerator)
    may_rename = config.run.exp_name is None and not (resuming or overwrite)
    resolved, lock_messages = lock_run(resolved, launch.accelerator, stack, may_rename)
    folder, messages = RunFolder(resolved.run_dir), messages + lock_messages
    if resuming != is_resuming(resolved, folder, launch, resume, overwrite):
        raise UserError(f"{folder.root} has changed while this run was being set up; start it again")
    state, damaged = load_checkpoint(folder, trained, inputs, launch) if resuming else (TrainState(), [])
    trained.scheduler.step_update(state.step)  # the checkpoint has the last rate of the cycle before, if one begins now
    sync.broadcast_from_rank0(launch.accelerator, lambda: open_folder(folder, resolved, state, resuming, launch.log))
    stack.push(lambda kind, *_: folder.remove_unless_resumable() if kind else None)
    session = TrainSession(
        resolved, folder, launch.log, launch.accelerator, trained.model, trained.optimizer, trained.scheduler,
        inputs.dataset, inputs.train_loader, inputs.eval_loader, inputs.loss, inputs.batch_size, state,
        trained.compile_seconds, Meter(launch.accelerator.device, resolved.run.telemetry),
        StatusExchange(launch.accelerator, stop_signals or StopSignalHandler()), MetricsBuffer(),
        trained.ema, trained.average, SlowdownDetector(), OtherProcesses(),
        None,
        stack,
    )  # fmt: skip
    return Ready(session, inputs, trained.whole_step, launch.threads, resuming, messages + damaged)


def check_same_step(runs: Sequence[Ready]) -> None:
    """Raise UserError unless all runs have taken the same number of steps."""
    steps = {run.session.folder.root.name: run.session.state.step for run in runs}
    if len(set(steps.values())) > 1:
        raise UserError(
            "--together needs runs that have taken the same number of steps, not "
            f"{', '.join(f'{step} ({name})' for name, step in steps.items())}; leave it out to continue one by one"
        )


def share_terminal(runs: Sequence[Ready]) -> None:
    """Let the lines of each run say in the terminal which seed they are about."""
    for run in runs:
        run.session.log.prefix = f"seed {run.session.config.run.seed}: "
        run.session.log.console = runs[0].session.log.console  # it can have one progress bar only
        run.messages.append(f"{len(runs)} seeds train together: seconds, energy and memory are those of all of them")


def start_launch(config: ResolvedConfig, stack: ExitStack) -> Launch:
    """Set threads, determinism and precision until `stack` closes, let malloc keep freed memory, and join all ranks."""
    threads = stack.enter_context(all_cores())
    preflight.check_compiled_once(config.run.compile)
    if config.run.deterministic:
        stack.enter_context(deterministic())
    stack.enter_context(own_precision(config.run.precision))
    accelerator = start_accelerator(config.optim.grad_accum, config.run.track, config.run_dir, config.run.precision)
    if accelerator.device.type == "cpu":
        memory.retain_freed_memory()  # this stays set: malloc offers no way to read the old setting
    return Launch(accelerator, Log(accelerator.is_main_process), threads)


def check_folder(
    config: ResolvedConfig, folder: RunFolder, launch: Launch, resume: ResumeMode, overwrite: bool
) -> tuple[ResolvedConfig, bool]:
    """Decide whether the run is resumed, and with which attention and micro-batches; nothing is written.

    Returns:
        The configuration, and whether the run is resumed.
    """
    accelerator = launch.accelerator
    start = config.model.init_from
    if start is not None and Path(start).resolve() == folder.root.resolve():
        raise UserError(f"--init-from {start} is the run that would be written; give another --exp-name")
    sync.broadcast_from_rank0(accelerator, RunLock(folder.root).check_free)
    if config.run.fit_memory:
        check_fit_memory()
        batches = sync.broadcast_from_rank0(accelerator, folder.recorded_batches) if resume != "never" else None
        config = config.with_batches(*batches) if batches else config
    resuming = is_resuming(config, folder, launch, resume, overwrite)
    recorded_in = None
    if resuming and config.model.attention == AUTO:
        recorded = sync.broadcast_from_rank0(accelerator, folder.recorded_implementations)
        if config.model.block != AUTO:
            recorded = {**recorded, "block": config.model.block}
        if recorded["block"] == "cpp":
            recorded = {**recorded, "attention": "cpp"}
        config, recorded_in = config.with_model(**recorded), folder.config
    check_block(config.model, None if recorded_in else accelerator.device)
    check_attention(config.model, accelerator.device, recorded_in)
    if config.run.compile or env.compiles():
        check_compiler(accelerator.device)
    check_batch_size(config.run.batch_size, accelerator.num_processes, config.optim.grad_accum)
    return config, resuming


def is_resuming(config: ResolvedConfig, folder: RunFolder, launch: Launch, resume: ResumeMode, overwrite: bool) -> bool:
    """Return on all ranks whether the run in `folder` is resumed.

    Raises:
        UserError: if the folder's content does not allow what is asked for.
    """
    return sync.broadcast_from_rank0(
        launch.accelerator, lambda: folder.should_resume(config.settings, resume, overwrite)
    )


def load_inputs(config: ResolvedConfig, accelerator: Accelerator, imitate_data: bool = False) -> Inputs:
    """Load the data set and fit the batch size to it."""
    ranks, grad_accum = accelerator.num_processes, config.optim.grad_accum
    dataset = load_data(config, accelerator, imitate_data)
    batch_size = fit_batch_size(config.run.batch_size, len(dataset.train.labels), ranks, grad_accum)
    rank_info = RankInfo(accelerator.device, accelerator.process_index, ranks)
    return Inputs(
        dataset,
        build_train_loader(config, dataset, batch_size, rank_info),
        build_eval_loader(config, dataset, rank_info),
        build_loss(config.optim, dataset, config.num_classes, accelerator.device, config.data.sampler == "balanced"),
        batch_size,
        micro_batch=batch_size // ranks // grad_accum,
    )


def load_checkpoint(
    folder: RunFolder, trained: Trained, inputs: Inputs, launch: Launch
) -> tuple[TrainState, list[str]]:
    """Load the newest undamaged checkpoint; returns the run's state, and messages about newer checkpoints."""
    data = inputs.dataset.identity() | inputs.loss.identity()
    return checkpoint.load(
        folder.checkpoints, launch.accelerator, trained.scheduler.optimizer, data, parallelize.check_checkpoint
    )


def open_folder(folder: RunFolder, config: ResolvedConfig, state: TrainState, resuming: bool, log: Log) -> None:
    """Bring the folder into the state that the run continues from, or create it."""
    if resuming:
        folder.record_extension(config.settings, state)
        folder.drop_after(state, config.run.keep)
    else:
        folder.create(config.settings)
    log.attach(folder.root / "train.log")


def record_or_warm_up(runs: Sequence[Ready], random_states: RandomStates) -> tuple[Sequence[TrainSession], list[str]]:
    """Record the step as one CUDA graph; if that was planned and fails, compile the step that is taken instead.

    Weights, optimizers and random states do not change.

    Returns:
        The sessions, and messages as `record_steps` returns them.
    """
    started = time.perf_counter()
    sessions, messages = record_steps([run.session for run in runs], random_states)
    if not runs[0].whole_step:
        return sessions, messages
    for own, run in zip(sessions, runs, strict=True) if sessions[0].graphed_step is None else ():
        optimizer = own.optimizer.optimizer
        take_first_passes(own.config, own.model, optimizer, own.ema, run.inputs, own.accelerator, whole_step=False)
    seconds = time.perf_counter() - started
    return [replace(s, compile_seconds=(s.compile_seconds or 0.0) + seconds) for s in sessions], messages

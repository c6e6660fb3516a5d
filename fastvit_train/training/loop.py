"""The training loop."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from fastvit_train.config import recipes
from fastvit_train.config.init_from import with_model_of
from fastvit_train.config.overrides import override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import sync
from fastvit_train.distributed.process_state import RandomStates, unchanged
from fastvit_train.models.evaluator import Evaluation, evaluate_model
from fastvit_train.runs.results import AVERAGE, BEST_WEIGHTS, LAST_EPOCH, score
from fastvit_train.runs.run_folder import ResumeMode
from fastvit_train.training import metrics
from fastvit_train.training.checkpointing import apply_save_error_policy, name_last_checkpoint, save_checkpoint
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.epoch_totals import EpochTotals, collect_totals, restore_totals
from fastvit_train.training.optim import final_weights
from fastvit_train.training.optim.loss import count_correct
from fastvit_train.training.preemption import StopSignalHandler, StopTraining, stopped
from fastvit_train.training.session import TrainSession, take_turns
from fastvit_train.training.setup import setup_together
from fastvit_train.utils.errors import UserError

Phase = Callable[[str], AbstractContextManager[Any]]
OnEpoch = Callable[[Path], object]
"""is called with the run's folder"""
Batch = tuple[Tensor, Tensor]


def train(
    recipe: str = "quickstart",
    *,
    resume: ResumeMode = "never",
    overwrite: bool = False,
    on_epoch: OnEpoch | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model and write its run folder, `runs_dir/exp_name`; returns the content of summary.json.

    Accuracies in it are fractions, losses are nats, times are seconds; a value that was not measured is None.

    Args:
        recipe: name of the settings to start from; `python -m fastvit_train recipes` lists them.
        resume: "auto" continues from the run's last checkpoint if there is one, "must" fails if there is none.
        overwrite: start over if the folder already holds a run.
        on_epoch: called on rank 0 with the run's folder once an epoch's metrics and checkpoint are there, such as to
            draw the curves; the other ranks wait for it. Random numbers that it draws do not change the training, and
            its time does not count as training time.
        settings: named like the flags, with _ for -: `epochs=3, model="c_vit_4_4_32", exp_name="try"`.

    Raises:
        UserError: if something is wrong with the settings, the data, the launch or the run's folder.
        Preempted: if SIGTERM or SIGUSR1 stopped the run; its checkpoint is written.
        KeyboardInterrupt: if SIGINT (Ctrl-C) stopped it; its checkpoint is written too.
    """
    config = override(recipes.recipe(recipe), with_model_of(settings), "train()")
    return fit(config, resume=resume, overwrite=overwrite, on_epoch=on_epoch)


def fit(
    config: TrainConfig,
    *,
    resume: ResumeMode = "never",
    overwrite: bool = False,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train the model that `config` describes; everything else is as in `train`."""
    return fit_together([config], resume=resume, overwrite=overwrite, on_epoch=on_epoch)[0]


def fit_together(
    configs: Sequence[TrainConfig],
    *,
    resume: ResumeMode = "never",
    overwrite: bool = False,
    on_epoch: OnEpoch | None = None,
    signals: StopSignalHandler | None = None,
) -> list[dict[str, Any]]:
    """Train models whose settings differ in seed and exp_name only, step by step in turn; see `train`.

    With --compile on one GPU, their steps are branches of one CUDA graph. Each run has the result that it would have
    alone. A signal or an error stops all of them. `signals` is a handler that is active already.
    """
    handler = StopSignalHandler() if signals is None else nullcontext(signals)
    with unchanged(), handler as stop_signals, RandomStates(len(configs)) as random_states:
        try:
            sessions = setup_together(configs, resume, overwrite, random_states, stop_signals)
        except Exception as error:  # such as the error of a compiler process that the same signal ended
            if stop_signals.received and not isinstance(error, UserError):
                message = f"stopped before the first step; the signal also caused {error!r}"
                raise stopped(stop_signals.received, message) from None
            raise
        try:
            with _progress_bar(sessions[0]) as bar:
                return take_turns([_train(session, bar, on_epoch) for session in sessions], random_states, stop_signals)
        except Exception as error:
            # An error of one rank alone reaches rank 0 as the loss of that rank, if at all.
            if sessions[0].accelerator.is_main_process or not getattr(error, "on_all_ranks", False):
                for session in sessions:
                    session.folder.remove_unless_resumable()
            raise
        finally:
            sessions[0].close()  # and with it all of them


def _progress_bar(session: TrainSession) -> ProgressBar:
    """Build the progress bar of a run, or of several runs that train together."""
    epochs = session.config.run.total_epochs
    total_steps = epochs * session.train_loader.steps_per_epoch
    return ProgressBar(session.log.console, total_steps, epochs, session.accelerator.num_processes)


def _train(session: TrainSession, bar: ProgressBar, on_epoch: OnEpoch | None) -> Generator[None, None, dict[str, Any]]:
    """Train and evaluate epoch by epoch, and write the results; returns the summary.

    It yields wherever a run waits for those that train together with it.
    """
    config, state, accelerator = session.config, session.state, session.accelerator
    metrics.start_trackers(session)
    evaluation = None
    try:
        while state.epoch < config.last_epoch and not final_weights.is_out_of_patience(session):
            session.status_exchange.start_phase()
            yield from take_steps(session, bar)
            session.status_exchange.start_phase()
            evaluation = _evaluate_epoch(session)
            if on_epoch is not None and accelerator.is_main_process:
                with unchanged():
                    on_epoch(session.folder.root)
            yield
    except StopTraining as stop:
        save_checkpoint(session)
        message = f"{stop} at step {state.step}; {name_last_checkpoint(session)}, --resume auto continues from it"
        raise stopped(stop.signal_number, message) from None
    weights = final_weights.bring_back(session)
    trained = evaluation is not None  # and not resumed after its last epoch
    if evaluation is None or weights != LAST_EPOCH:
        evaluation = _evaluate_final(session, weights)
    summary = metrics.finish(session, evaluation, weights, trained)
    metrics.finish_trackers(session)
    return summary


def train_epoch(session: TrainSession, bar: ProgressBar, phase: Phase = record_function) -> None:
    """Train to the end of the epoch under way; `session.state` keeps the step, the losses and the time.

    Args:
        session: the run.
        bar: shows how far the epoch has come.
        phase: `phase(name)` is a context that each part of a step runs in: "input", "forward", "backward" and
            "optimizer", or "graph" if the step is one CUDA graph; and "waiting" when the host waits for the device, a
            few times a second.

    Raises:
        StopTraining: on all ranks, after a signal; `session.state` is complete, so that a checkpoint can be saved.
        UserError: if a loss is NaN or inf, or if a checkpoint cannot be saved.
    """
    for _ in take_steps(session, bar, phase):
        pass


def take_steps(session: TrainSession, bar: ProgressBar, phase: Phase = record_function) -> Iterator[None]:
    """Train as `train_epoch` does; yields after each step, and before and after what is not training time."""
    state, steps, save_every = session.state, session.train_loader.steps_per_epoch, session.config.run.save_every
    session.model.train()
    session.meter.start()
    launch_step, totals = _start_epoch(session, phase)
    while state.step_in_epoch < steps:
        _train_step(session, launch_step)
        yield  # the last of several runs launches the steps of all
        bar.update(state, totals.losses, totals.correct, session.batch_size)
        if save_every and state.step % save_every == 0 and state.step_in_epoch < steps:
            collect_totals(session, totals)
            yield
            save_checkpoint(session)
            yield
            session.meter.start()
        with phase("waiting"):
            try:
                losses_are_finite = session.status_exchange.after_batch(totals.is_nonfinite)
            except StopTraining:
                collect_totals(session, totals)
                raise
            if not losses_are_finite:
                break  # collect_totals raises the error
    with phase("waiting"):
        collect_totals(session, totals)
    yield


def _start_epoch(session: TrainSession, phase: Phase) -> tuple[Callable[[], None], EpochTotals]:
    """Prepare the rest of the epoch under way; returns what launches a step of it, and the totals that it adds to."""
    state, graphed_step, totals = session.state, session.graphed_step, restore_totals(session)
    if graphed_step is None:
        micro_batches = session.train_loader.micro_batches(state.epoch, state.step_in_epoch)
        return partial(_launch_operators, session, micro_batches, totals, phase), totals

    def launch_graph() -> None:
        with phase("graph"):
            graphed_step.launch()

    return launch_graph, graphed_step.start_epoch(session, totals)


def _train_step(session: TrainSession, launch_step: Callable[[], None]) -> None:
    """Take one optimizer step."""
    launch_step()
    session.state.step += 1
    session.state.step_in_epoch += 1
    session.scheduler.step_update(session.state.step)


def _launch_operators(session: TrainSession, micro_batches: Iterator[Batch], totals: EpochTotals, phase: Phase) -> None:
    """Launch a step operator by operator; `graphed_step.device_step` is the same as one function."""
    config, accelerator, state, model = session.config.optim, session.accelerator, session.state, session.model
    for _ in range(config.grad_accum):
        with phase("input"):
            images, labels = next(micro_batches)
        with accelerator.accumulate(model):
            with phase("forward"):
                logits = model(images)
                loss = session.loss(logits, labels)
            with phase("backward"):
                accelerator.backward(loss)
            with phase("optimizer"):
                if config.clip_grad is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                with totals.count_skipped(accelerator.scaler):
                    session.optimizer.step()
                session.optimizer.zero_grad()
        totals.losses[state.step_in_epoch] += loss.detach() / config.grad_accum
        totals.correct += count_correct(logits.detach(), labels)
    if session.ema is not None:
        with phase("optimizer"):
            session.ema.update(session.bare_model, state.step + 1)


def _evaluate_epoch(session: TrainSession) -> Evaluation:
    """Evaluate after an epoch, record the epoch, and save a checkpoint."""
    state, run = session.state, session.config.run
    started = time.perf_counter()
    if session.ema is not None:  # each rank has averaged its own batches' statistics
        sync.share_buffers(session.ema.module)
    evaluation = evaluate_model(
        session.eval_model, session.eval_loader, session.accelerator, session.status_exchange.after_batch
    )
    eval_seconds = time.perf_counter() - started
    recorded = metrics.record_epoch(session, evaluation, eval_seconds)
    state.close_epoch()
    final_weights.add_to_average(session)
    if state.add_evaluation(evaluation.accuracy, score(recorded, run.keep_best_of), eval_seconds, run.target_accuracy):
        metrics.log_target_reached(session)
    _save_weights(session)  # before the checkpoint: a run that is resumed from it does not write them again
    save_checkpoint(session)
    return evaluation


def _evaluate_final(session: TrainSession, weights: str) -> Evaluation:
    """Evaluate the weights that the run ends with; those of an average may be the first to reach the target."""
    state, started = session.state, time.perf_counter()
    evaluation = evaluate_model(session.eval_model, session.eval_loader, session.accelerator)
    if weights == AVERAGE:
        state.eval_seconds += time.perf_counter() - started
        if state.reaches(evaluation.accuracy, session.config.run.target_accuracy):
            metrics.log_target_reached(session)
    return evaluation


def _save_weights(session: TrainSession) -> None:
    """Write the weights after the best epoch so far, and those that --save-model-every asks for."""
    state, every = session.state, session.config.run.save_model_every
    with apply_save_error_policy(session):
        if state.best_step == state.step:
            metrics.write_weights(session, BEST_WEIGHTS, {"step": str(state.step)})
        if every and state.epoch % every == 0:
            metrics.write_weights(session, f"model_epoch_{state.epoch}.safetensors")

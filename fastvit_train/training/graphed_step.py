"""The whole training step as one CUDA graph: the host launches it with a single call, and passes nothing to it.

Sample order, learning rates and the weights of the moving average lie on the device, in tables with a row for each step
of the epoch, next to the number of the step. Everything from the images to the losses is compiled as one function.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastvit_train.config.resolved import ResolvedConfig
from fastvit_train.data.loader import TrainLoader
from fastvit_train.distributed import env, parallelize, sync
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.models import record_graph, side_by_side
from fastvit_train.models.compiling import compile_function
from fastvit_train.training.epoch_totals import EpochTotals
from fastvit_train.training.optim.loss import count_correct
from fastvit_train.training.optim.optimizer import with_device_lr, works_in_graph
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.torch_private import recompile_limit

RECOMPILE_LIMIT = 256
"""enough for all runs of a process: they compile the same function for other models and settings"""


@dataclass(frozen=True)
class StepTables:
    """What the steps of an epoch read and write, on the device; the memory stays the same for all epochs."""

    step: Tensor
    """number of the step in the epoch, int64 (1,)"""
    samples: Tensor
    """sample indices of this rank, int64 (steps, images per step)"""
    learning_rates: Tensor
    """float32 (steps, parameter groups)"""
    ema_weights: Tensor
    """weight of the model in the moving average of the weights, float32 (steps,)"""
    totals: EpochTotals

    def fill(self, session: TrainSession, totals: EpochTotals) -> None:
        """Write the rows of the epoch that `session.state` is in, and continue from `totals`."""
        state, loader = session.state, session.train_loader
        samples = loader.start_epoch(state.epoch)[: loader.steps_per_epoch, 0]
        self.step.fill_(state.step_in_epoch)
        self.samples[: len(samples)].copy_(samples)
        learning_rates, ema_weights = _schedules(session, len(samples))
        self.learning_rates[: len(samples)].copy_(learning_rates)
        self.ema_weights[: len(samples)].copy_(ema_weights)
        self.totals.copy_(totals)


def build_tables(session: TrainSession) -> StepTables:
    """Allocate the tables for the epochs of a run."""
    steps, device = session.train_loader.steps_per_epoch, session.accelerator.device
    groups, images = len(session.optimizer.param_groups), session.batch_size // session.accelerator.num_processes
    return StepTables(
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(steps, images, dtype=torch.int64, device=device),
        torch.zeros(steps, groups, device=device),
        torch.zeros(steps, device=device),
        EpochTotals.zeros(steps, device),
    )


def _schedules(session: TrainSession, steps: int) -> tuple[Tensor, Tensor]:
    """Return the learning rates and the weights of the moving average of the steps of the epoch, on the CPU."""
    scheduler, ema, first = session.scheduler, session.ema, session.state.step - session.state.step_in_epoch
    groups = session.optimizer.param_groups
    now = [group["lr"] for group in groups]
    learning_rates = []
    for step in range(first, first + steps):
        scheduler.step_update(step)
        learning_rates.append([group["lr"] for group in groups])
    for group, lr in zip(groups, now, strict=True):
        group["lr"] = lr
    ema_weights = [0.0 if ema is None else 1 - ema.get_decay(step + 1) for step in range(first, first + steps)]
    return torch.tensor(learning_rates), torch.tensor(ema_weights)


def device_step(session: TrainSession, tables: StepTables) -> Callable[..., None]:
    """Return a function that takes the optimizer step whose number is in `tables`, without a value from the host.

    It does what `loop.train_epoch` does in a step, and on any device. With `exchange=False` no rank waits for another,
    and each takes the step with its own gradients.
    """
    model, optimizer, accelerator = session.bare_model, session.optimizer, session.accelerator
    config = session.config.optim

    def compute_loss() -> Tensor:
        images, labels = session.train_loader.batch(tables.samples.index_select(0, tables.step)[0])
        logits = model(images)
        loss = session.loss(logits, labels)
        tables.totals.losses.index_copy_(0, tables.step, loss.detach()[None])
        tables.totals.correct.add_(count_correct(logits.detach(), labels))
        return loss

    if session.config.run.compile:
        compute_loss = compile_function(compute_loss, accelerator.device)

    def step(exchange: bool = True) -> None:
        accelerator.backward(compute_loss())
        if exchange and accelerator.num_processes > 1:
            parallelize.average_gradients(model.parameters(), accelerator.num_processes)
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
        learning_rates = tables.learning_rates.index_select(0, tables.step)[0]
        with with_device_lr(optimizer, learning_rates), tables.totals.count_skipped(accelerator.scaler):
            optimizer.step()
        optimizer.zero_grad()
        if session.ema is not None:
            _update_ema(session, tables.ema_weights.index_select(0, tables.step))
        tables.step.add_(1).remainder_(len(tables.samples))  # trials of the step may pass the end of a short epoch

    return step


@torch.no_grad()
def _update_ema(session: TrainSession, weight: Tensor) -> None:
    """Do what timm's `ModelEmaV3.update` does, with a weight of the model that is on the device, (1,)."""
    assert session.ema is not None
    averages, values = session.ema.module.state_dict().values(), session.bare_model.state_dict().values()
    pairs = list(zip(averages, values, strict=True))
    moving = [pair for pair in pairs if pair[0].is_floating_point()]
    changes = torch._foreach_sub([value for _, value in moving], [average for average, _ in moving])
    torch._foreach_mul_(changes, weight[0])
    torch._foreach_add_([average for average, _ in moving], changes)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)


@dataclass(frozen=True)
class GraphedStep:
    """A recorded training step."""

    launch: Callable[[], object]
    """takes the step; for runs that train together, the last one's takes those of all, and the others' do nothing"""
    tables: StepTables

    def start_epoch(self, session: TrainSession, totals: EpochTotals) -> EpochTotals:
        """Prepare for the rest of the epoch that `session.state` is in; returns the totals that the graph adds to."""
        self.tables.fill(session, totals)
        return self.tables.totals


def why_not_recordable(
    config: ResolvedConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: TrainLoader,
) -> str | None:
    """Why the whole training step of a compiled run cannot be one CUDA graph, or None if it can, on all ranks alike."""
    if accelerator.device.type != "cuda":
        return "it does not run on a CUDA GPU"
    if env.uses_fsdp():
        return "FSDP gathers the weights of each block when it needs them"
    if accelerator.num_processes > 1 and (reason := parallelize.why_ddp_is_needed(model)):
        return reason
    if config.optim.grad_accum > 1:
        return "--grad-accum takes several passes per step"
    if not loader.is_resident:
        return "the images are not in the GPU's memory; --stream never loads them there"
    if not works_in_graph(optimizer):
        return f"optimizer {config.optim.optimizer} needs the host; muon, nmuon, adam and adamw do not"
    return None


def record_steps(
    sessions: Sequence[TrainSession], random_states: RandomStates
) -> tuple[Sequence[TrainSession], list[str]]:
    """Record the training steps of sessions that are ready to train, as branches of one graph, if it can be done.

    Weights, optimizers, random states and totals do not change.

    Args:
        sessions: one run, or several that differ in their seeds only.
        random_states: those of the runs.

    Returns:
        The sessions with the recorded steps, or all of them without, and messages that say why.
    """
    first, together = sessions[0], len(sessions) > 1
    config, accelerator, optimizer = first.config, first.accelerator, first.optimizer.optimizer
    reason = why_not_recordable(config, accelerator, first.bare_model, optimizer, first.train_loader)
    if not config.run.compile or accelerator.device.type != "cuda":
        if not together:
            return sessions, []
        reason = reason or "--compile is not given"
    if reason is None:
        tables = [build_tables(session) for session in sessions]
        graph, reason = _record_on_all_ranks(sessions, tables, random_states)
        if graph is not None:
            first.resources.callback(graph.reset)  # NCCL cannot end before the graphs that contain its calls
            launches = [*[_launch_nothing] * (len(sessions) - 1), graph.replay]
            return [
                replace(session, graphed_step=GraphedStep(launch, own))
                for session, launch, own in zip(sessions, launches, tables, strict=True)
            ], []
        sessions = [without_graph(session) for session in sessions]
    what = "the seeds take their steps in turn, not in" if together else "the step is compiled, but not launched as"
    return sessions, [f"{what} one CUDA graph: {reason}"]


def without_graph(session: TrainSession) -> TrainSession:
    """Return a session that launches kernel by kernel the step that is recorded in `session`, or was to be."""
    model = session.bare_model
    if session.accelerator.num_processes > 1:
        model = parallelize.wrap_in_ddp(model, session.config.optim.grad_accum)
    return replace(session, graphed_step=None, model=model)


def _record_on_all_ranks(
    sessions: Sequence[TrainSession], tables: Sequence[StepTables], random_states: RandomStates
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """Record the steps on all ranks; returns the graph, or None and, on all ranks, why one of them could not.

    Several ranks first try it without the exchange of gradients, and agree whether all of them succeeded: a rank that
    failed alone would leave the others waiting in an exchange.
    """
    steps, graph = [device_step(session, own) for session, own in zip(sessions, tables, strict=True)], None
    for exchange in (False, True) if sessions[0].accelerator.num_processes > 1 else (True,):
        graph, reason = None, None  # this frees the memory of the trial
        try:
            graph = _record(sessions, tables, [partial(step, exchange) for step in steps], random_states)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
        if (reason := sync.first_of_ranks(reason)) is not None:
            return None, reason
    return graph, None


def _record(
    sessions: Sequence[TrainSession],
    tables: Sequence[StepTables],
    steps: Sequence[Callable[[], None]],
    random_states: RandomStates,
) -> torch.cuda.CUDAGraph:
    """Record `steps` of the sessions as branches of one graph."""
    branches = []
    with ExitStack() as stack:
        for run, (session, own, step) in enumerate(zip(sessions, tables, steps, strict=True)):
            random_states.switch_to(run)
            own.fill(session, own.totals)
            own.step.zero_()
            session.model.train()
            stack.enter_context(_unchanged(session, own))
            stack.callback(random_states.switch_to, run)  # before its state is restored
            branches.append(_with_random_state(step, random_states, run))
        stack.enter_context(recompile_limit(RECOMPILE_LIMIT))
        whole = branches[0] if len(branches) == 1 else side_by_side(branches)
        return record_graph(whole, generators=random_states.of_gpu(sessions[0].accelerator.device))


def _with_random_state(step: Callable[[], None], random_states: RandomStates, run: int) -> Callable[[], None]:
    """Return the step of the run with this index, which draws from its random state."""

    def own_step() -> None:
        random_states.switch_to(run)
        step()

    return own_step


def _launch_nothing() -> None:
    """Stand for the launch of a graph that the last of several runs launches."""


@contextmanager
def _unchanged(session: TrainSession, tables: StepTables) -> Iterator[None]:
    """Restore, at the end, all that training steps change, in the same memory; state that was created becomes zero."""
    device, scaler = session.accelerator.device, session.accelerator.scaler
    scaler_state = None if scaler is None else scaler.state_dict()
    before = [(tensor, tensor.detach().clone()) for tensor in _changing(session, tables)]
    known = {id(tensor) for tensor, _ in before}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        session.optimizer.zero_grad()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in _changing(session, tables):
                if id(tensor) not in known:
                    tensor.zero_()
        if scaler is not None:
            scaler.load_state_dict(scaler_state)


def _changing(session: TrainSession, tables: StepTables) -> Iterator[Tensor]:
    """Yield the tensors that a training step changes, but for the gradients and the scaler's."""
    yield tables.step
    yield from vars(tables.totals).values()
    for model in (session.bare_model, *([] if session.ema is None else [session.ema.module])):
        yield from model.parameters()
        yield from model.buffers()
    for state in session.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))

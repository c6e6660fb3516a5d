"""`plan`: how a run scales, from its step measured on one process and collectives counted on simulated ones."""

import copy
import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from torch.profiler import record_function

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.inputs import build_train_loader
from fastvit_train.data.loader import RankInfo
from fastvit_train.distributed import accelerator, parallelize
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.models import OUR_MODELS, check_model
from fastvit_train.profiling import collectives
from fastvit_train.profiling.collectives import RankCost
from fastvit_train.profiling.scaling_estimate import DDP, FSDP2, SINGLE, MeasuredStep, Plan, Row, conclude, estimate_row
from fastvit_train.profiling.scaling_options import PlanOptions
from fastvit_train.profiling.scaling_table import format_sources, plan_curves, plan_table
from fastvit_train.profiling.short_run import create_output_folder, make_progress_bar, short_run, time_epoch
from fastvit_train.runs.plots.figures import plot_scaling
from fastvit_train.training.graphed_step import record_steps, without_graph
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.atomic_io import as_save_error, write_atomically
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError, counted
from fastvit_train.utils.timing import quartiles

OURS = "ours"
MAX_WORLD_SIZE = 4096
ROUNDS = 3
TABLE_WIDTH = 130
CostCounter = Callable[[TrainSession, int], RankCost]


def plan_run(config: TrainConfig, options: PlanOptions) -> list[Plan]:
    """Plan the configured run for each model, print the tables, and write plan.json and plan.png.

    Args:
        config: the run on one process; nothing is written into its folder.
        options: what to plan, and the folder for the results.

    Raises:
        UserError: for anything wrong with the options, the configuration or the data, or if this process belongs to a
            process group or was launched to join one.
    """
    collectives.check_no_process_group()
    options = check_options(options)
    create_output_folder(options.output)
    plans = []
    for name in options.models or (config.model.model,):
        started = time.perf_counter()
        plan = plan_model(replace(config, model=replace(config.model, model=name)), options)
        seconds = time.perf_counter() - started
        console = Terminal(width=TABLE_WIDTH, soft_wrap=True)
        console.print(plan_table(plan, options))
        for line in (*format_sources(plan, options), f"planned in {seconds:.0f} s", plan.conclusion):
            console.print(line, markup=False)
        plans.append(plan)
    network = {"link": options.link, "link_gbps": options.network.gbps, "latency_us": options.network.latency_us}
    text = json.dumps({"scaling": options.scaling, **network, "plans": [asdict(plan) for plan in plans]}, indent=1)
    with as_save_error(f"{options.output} cannot be written; choose another --output"):
        write_atomically(options.output / "plan.json", text + "\n")
    plot_scaling({plan.model: plan_curves(plan) for plan in plans}, options.output / "plan.png")
    print(f"written to {options.output}: plan.json, plan.png")
    return plans


def check_options(options: PlanOptions) -> PlanOptions:
    """Check the options, and replace `ours` by the names of our models and add the world size 1.

    Raises:
        UserError: if an option is out of range, or if a model is unknown.
    """
    wrong = [size for size in options.world_sizes if not 1 <= size <= MAX_WORLD_SIZE]
    if wrong or not options.world_sizes:
        raise UserError(f"--world-sizes {wrong[0] if wrong else ''} is out of range; allowed: 1 to {MAX_WORLD_SIZE}")
    if not 0 < options.network.gbps < float("inf"):
        raise UserError(f"--link-gbps {options.link_gbps} is out of range; allowed: above 0")
    if not 0 <= options.network.latency_us < float("inf"):
        raise UserError(f"--latency-us {options.latency_us} is out of range; allowed: 0 or more")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} is out of range; allowed: 1 or more")
    models = dict.fromkeys(name for given in options.models for name in (OUR_MODELS if given == OURS else [given]))
    for name in models:
        check_model(name)
    return replace(options, models=tuple(models), world_sizes=tuple(sorted({1, *options.world_sizes})))


def plan_model(config: TrainConfig, options: PlanOptions) -> Plan:
    """Measure, count and estimate the rows of the plan for the model of `config`.

    Args:
        config: the run on one process.
        options: as returned by `check_options`.
    """
    with short_run(config, options.steps) as session:
        images, notes = _images_per_process(session, options)
        cost_counters, reasons = _available_strategies(session)
        notes += reasons + _graph_notes(session, cost_counters)
        steps = _measure_steps(session, images, cost_counters, options.steps)
        rows = _estimate_rows(session, steps, cost_counters, options)
        return Plan(
            session.config.model.model,
            sum(p.numel() for p in session.bare_model.parameters()),
            accelerator.device_name(session.accelerator.device),
            list(dict.fromkeys(steps.values())),
            rows,
            notes,
            f"{session.config.model.model}: {conclude(rows)}",
        )


def _images_per_process(session: TrainSession, options: PlanOptions) -> tuple[dict[int, int], list[str]]:
    """Return the number of images per process for each world size, and notes about what is missing."""
    notes = ["activations are counted without --compile"] if session.config.run.compile else []
    if options.scaling == "weak":
        return dict.fromkeys(options.world_sizes, session.batch_size), notes
    accum, total = session.config.optim.grad_accum, session.batch_size
    images = {n: total // n for n in options.world_sizes if total % (n * accum) == 0}
    if missing := [f"{n:,}" for n in options.world_sizes if n not in images]:
        notes.append(f"left out: {', '.join(missing)} processes, as they can't share {counted(total, 'image')} equally")
    return images, notes


def _available_strategies(session: TrainSession) -> tuple[dict[str, CostCounter], list[str]]:
    """Return the function that counts the cost of each strategy that this run allows, and why others are left out."""
    cost_counters: dict[str, CostCounter] = {DDP: collectives.ddp_cost}
    try:
        parallelize.check_shardable([collectives.BLOCK_CLASS], session.bare_model, session.optimizer.optimizer)
    except UserError as error:
        return cost_counters, [f"left out: {FSDP2}, as {error}"]
    return {**cost_counters, FSDP2: collectives.fsdp2_cost}, []


def _is_graph(session: TrainSession, strategy: str) -> bool:
    """Whether the step is one CUDA graph on each of several ranks."""
    return (
        session.graphed_step is not None
        and strategy == DDP
        and parallelize.why_ddp_is_needed(session.bare_model) is None
    )


def _graph_notes(session: TrainSession, strategies: Iterable[str]) -> list[str]:
    """Say which steps are measured without a CUDA graph, if the step of one process is one."""
    others = [strategy for strategy in strategies if not _is_graph(session, strategy)]
    if session.graphed_step is None or not others:
        return []
    return [f"the step is measured as one CUDA graph, but for {' and '.join(others)}, which launch kernel by kernel"]


def _estimate_rows(
    session: TrainSession,
    steps: dict[tuple[str, int], MeasuredStep],
    cost_counters: dict[str, CostCounter],
    options: PlanOptions,
) -> list[Row]:
    network = options.network
    single = estimate_row(SINGLE, 1, collectives.single_process_cost(session), steps[SINGLE, 1], network)
    return [single] + [
        estimate_row(strategy, n, cost_counters[strategy](session, n), step, network, single.images_per_second)
        for (strategy, n), step in steps.items()
        if n > 1
    ]


def _measure_steps(
    session: TrainSession, images: dict[int, int], strategies: Iterable[str], steps: int
) -> dict[tuple[str, int], MeasuredStep]:
    """Measure, in one process, the step of a process for each strategy and world size, as a CUDA graph if it is one."""

    @functools.cache
    def measure(count: int, is_graph: bool) -> MeasuredStep:
        return measure_step(session if is_graph else without_graph(session), count, steps)

    single = {(SINGLE, 1): measure(images[1], session.graphed_step is not None)}
    return single | {
        (strategy, n): measure(count, _is_graph(session, strategy))
        for strategy in strategies
        for n, count in images.items()
        if n > 1
    }


def measure_step(session: TrainSession, images: int, steps: int) -> MeasuredStep:
    """Time rounds of `steps` training steps on batches of `images` images, and count the activations."""
    rank = RankInfo(session.accelerator.device)
    loader = build_train_loader(session.config, session.dataset, images, rank)
    loader.steps_per_epoch = min(steps, loader.steps_per_epoch)
    resized, session = images != session.batch_size, replace(session, train_loader=loader, batch_size=images)
    if session.graphed_step is not None and resized:
        (session,), messages = record_steps([session], RandomStates(1))
        for line in messages:
            session.log.line(line)
    bar = make_progress_bar(session)
    time_epoch(session, bar, record_function)  # warm-up
    rounds = [time_epoch(session, bar, record_function) for _ in range(ROUNDS)]
    return MeasuredStep(images, quartiles(rounds).median, (min(rounds), max(rounds)), count_activations(session))


def count_activations(session: TrainSession) -> int:
    """Count the bytes that autograd saves in the forward pass and the loss of a micro-batch for the backward pass."""
    model = copy.deepcopy(session.bare_model).train()  # a copy is not compiled
    images, labels = next(session.train_loader.micro_batches(0))

    def forward() -> None:
        with session.accelerator.autocast():
            logits = model(images)
        session.loss(logits.float(), labels)

    return memory.saved_for_backward(forward, tuple(model.parameters()))

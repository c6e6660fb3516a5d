"""What more machines would bring: memory, communication and time of a step against the number of processes.

What one process holds and exchanges is counted (collectives.py), the step of one is measured; what a step of many takes
is estimated from both.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import record_function

from fastvit_train import collectives, launch, memory, plots
from fastvit_train.collectives import Share
from fastvit_train.config import TrainConfig
from fastvit_train.data.loader import Place
from fastvit_train.errors import UserError
from fastvit_train.models import OUR_MODELS, check_model
from fastvit_train.setup import Job, build_train_loader
from fastvit_train.tracking import write_atomically
from fastvit_train.trial import bar_of, make_output, timed_epoch, trial

OURS = "ours"
LARGEST = 4096
ROUNDS = 3
ALONE, DDP, FSDP2 = "alone", "DDP", "FSDP2"
HALF = 0.5
TABLE_WIDTH = 118
COLUMNS = (
    *("processes", "weights, MiB", "gradients, MiB", "optimizer, MiB", "activations, MiB", "gathered, MiB"),
    *("memory, MiB", "collectives", "sent, MiB", "step, ms", "img/s", "efficiency"),
)


@dataclass(frozen=True)
class PlanOptions:
    """What is planned."""

    models: tuple[str, ...] = ()
    """plan these instead of --model; `ours` stands for all of ours"""
    world_sizes: tuple[int, ...] = tuple(2**i for i in range(11))
    """numbers of processes"""
    scaling: Literal["weak", "strong"] = "weak"
    """weak: each process takes --batch-size images; strong: together they do"""
    link_gbps: float = 100.0
    """10^9 bits per second that a process can send, assumed"""
    latency_us: float = 20.0
    """microseconds that a message from one process to the next takes besides, assumed"""
    steps: int = 5
    """to measure at a time"""
    output: Path = Path("plan")
    """folder for the picture and the figures"""


@dataclass(frozen=True)
class Step:
    """A step of one process alone, measured."""

    images: int
    seconds: float
    spread: tuple[float, float]
    """the fastest and the slowest round's"""
    activations: int
    """bytes that autograd keeps from a forward pass for the backward pass"""


@dataclass(frozen=True)
class Row:
    """One way to train on so many processes; memory and traffic are one process's, MiB."""

    way: str
    processes: int
    images: int
    """per process and step"""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    memory: float
    collectives: int
    sent: float
    communication_seconds: float
    step_seconds: float
    images_per_second: float
    """of all processes"""
    efficiency: float
    """images/s of all over those of as many processes that needn't wait for each other"""


@dataclass(frozen=True)
class Plan:
    """Of one model."""

    model: str
    parameters: int
    device: str
    steps: list[Step]
    """measured, by falling images per process"""
    rows: list[Row]
    left_out: list[str]
    """and why"""
    conclusion: str


def plan_run(config: TrainConfig, options: PlanOptions) -> list[Plan]:
    """Plan the run that `config` describes for each of the models, print the tables, write `options.output`.

    Args:
        config: of the run on one process; nothing is written into its folder.
        options: what is planned; into its output go plan.json and plan.png.

    Raises:
        UserError: for anything wrong with the options, the configuration or the data, or several processes.
    """
    options = checked(options)
    make_output(options.output)
    plans = []
    for name in options.models or (config.model.model,):
        started = time.perf_counter()
        plan = plan_model(replace(config, model=replace(config.model, model=name)), options)
        console = Console(width=TABLE_WIDTH, highlight=False)
        console.print(table(plan, options))
        for line in (*lines(plan, options), f"planned in {time.perf_counter() - started:.0f} s", plan.conclusion):
            console.print(line, markup=False, soft_wrap=True)
        plans.append(plan)
    found = {"scaling": options.scaling, "link_gbps": options.link_gbps, "latency_us": options.latency_us}
    text = json.dumps({**found, "plans": [asdict(plan) for plan in plans]}, indent=1)
    write_atomically(options.output / "plan.json", text + "\n")
    plots.plot_scaling({plan.model: curves(plan) for plan in plans}, options.output / "plan.png")
    print(f"written to {options.output}: plan.json, plan.png")
    return plans


def checked(options: PlanOptions) -> PlanOptions:
    """`options` with the names and numbers of processes that they stand for; UserError where one is out of range."""
    wrong = [size for size in options.world_sizes if not 1 <= size <= LARGEST]
    if wrong or not options.world_sizes:
        raise UserError(f"--world-sizes {wrong[0] if wrong else ''} is out of range; allowed: 1 to {LARGEST}")
    if not 0 < options.link_gbps < float("inf"):
        raise UserError(f"--link-gbps {options.link_gbps} is out of range; allowed: above 0")
    if not 0 <= options.latency_us < float("inf"):
        raise UserError(f"--latency-us {options.latency_us} is out of range; allowed: 0 or more")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} is out of range; allowed: 1 or more")
    models = dict.fromkeys(name for given in options.models for name in (OUR_MODELS if given == OURS else [given]))
    for name in models:
        check_model(name)
    return replace(options, models=tuple(models), world_sizes=tuple(sorted({1, *options.world_sizes})))


def plan_model(config: TrainConfig, options: PlanOptions) -> Plan:
    """Measure and count for the model of `config`; `options` as `checked` leaves them."""
    with trial(config, options.steps) as job:
        collectives.check_alone()
        accum, left_out = job.config.optim.grad_accum, []
        if job.config.run.compile:
            left_out.append("--compile: what autograd keeps is counted without it")
        images = dict.fromkeys(options.world_sizes, job.batch_size)
        if options.scaling == "strong":
            images = {n: job.batch_size // n for n in options.world_sizes if job.batch_size % (n * accum) == 0}
        if uncut := [f"{n:,}" for n in options.world_sizes if n not in images]:
            left_out.append(f"{', '.join(uncut)} processes: {job.batch_size} images can't be cut evenly among them")
        ways: dict[str, Callable[[Job, int], Share]] = {DDP: collectives.ddp}
        try:
            collectives.check_shardable(job)
            ways[FSDP2] = collectives.fsdp2
        except UserError as error:
            left_out.append(f"{FSDP2}: {error}")
        steps = {count: measure(job, count, options.steps) for count in dict.fromkeys(images.values())}
        one = row(ALONE, 1, collectives.alone(job), steps[images[1]], options)
        rows = [one]
        for way, share in ways.items():
            several = (n for n in images if n > 1)
            rows += [row(way, n, share(job, n), steps[images[n]], options, one.images_per_second) for n in several]
        return Plan(
            job.config.model.model,
            sum(p.numel() for p in job.bare_model.parameters()),
            launch.device_name(job.accelerator.device),
            [*steps.values()],
            rows,
            left_out,
            f"{job.config.model.model}: {conclusion(rows)}",
        )


def measure(job: Job, images: int, steps: int) -> Step:
    """Train on batches of so many images, for some rounds of `steps` steps."""
    loader = build_train_loader(job.config, job.dataset, job.bare_model, images, Place(job.accelerator.device))
    loader.steps_per_epoch = min(steps, loader.steps_per_epoch)
    job = replace(job, train_loader=loader, batch_size=images)
    bar = bar_of(job)
    timed_epoch(job, bar, record_function)
    rounds = [timed_epoch(job, bar, record_function) for _ in range(ROUNDS)]
    return Step(images, statistics.median(rounds), (min(rounds), max(rounds)), activations(job))


def activations(job: Job) -> int:
    """Bytes that autograd keeps of a micro-batch's forward pass and loss for the backward pass."""
    model = copy.deepcopy(job.bare_model).train()  # a copy is not compiled
    images, labels = next(job.train_loader.micro_batches(0))

    def forward() -> None:
        with job.accelerator.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=job.config.optim.label_smoothing)

    return memory.saved_for_backward(forward, tuple(model.parameters()))


def row(
    way: str, processes: int, share: Share, step: Step, options: PlanOptions, rate_alone: float | None = None
) -> Row:
    """What a process holds and sends, and what a step of all of them takes.

    Args:
        share: what one of them holds and exchanges.
        step: measured on one process, with the images that each of them takes.
        rate_alone: images/s of one process alone; that of `step` by default.
    """
    sent = sum(collective.sent(processes) for collective in share.collectives)
    hops = sum(collective.hops(processes) for collective in share.collectives)
    communication = 8 * sent / (options.link_gbps * 1e9) + hops * options.latency_us * 1e-6
    rate = processes * step.images / (step.seconds + communication)
    held = (share.weights, share.gradients, share.optimizer, step.activations, share.gathered)
    return Row(
        way,
        processes,
        step.images,
        *(size / 2**20 for size in (*held, sum(held))),
        collectives=len(share.collectives),
        sent=sent / 2**20,
        communication_seconds=communication,
        step_seconds=step.seconds + communication,
        images_per_second=rate,
        efficiency=rate / (processes * (rate_alone or rate)),
    )


def conclusion(rows: list[Row]) -> str:
    """Up to how many processes it is worth while, and whether sharding saves memory."""
    said, largest = [], {}
    for way in (DDP, FSDP2):
        own = [row for row in rows if row.way == way]
        if not own:
            continue
        largest[way] = own[-1]
        good = [row.processes for row in own if row.efficiency >= HALF]
        if len(good) == len(own):
            what = f"each of {own[-1].processes:,} processes still adds {own[-1].efficiency:.0%} of what one does alone"
        elif good:
            what = f"beyond {max(good):,} processes less than half of each adds to the whole"
        else:
            what = f"already of {own[0].processes:,} processes less than half of each adds to the whole"
        said.append(f"with {way} {what}")
    if len(largest) == 2:
        share = largest[FSDP2].memory / largest[DDP].memory
        said.append(f"at {largest[FSDP2].processes:,} FSDP2 takes {share:.0%} of DDP's memory")
    return "; ".join(said) or "no more than one process was planned"


def table(plan: Plan, options: PlanOptions) -> Table:
    """A line per way and number of processes."""
    one, last = plan.rows[0], max(plan.rows, key=lambda row: row.processes)
    size = f"{one.images} images over all processes"
    if options.scaling == "weak":
        size = f"{one.images} images per process, so that the batch grows to {last.images * last.processes:,}"
    shown = Table(
        title=f"{plan.model}, {plan.parameters:,} parameters; {options.scaling} scaling: {size}",
        caption="MiB are of one process, img/s of all",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("")
    for name in COLUMNS:
        shown.add_column(name, justify="right", no_wrap="\n" in name)
    for row in plan.rows:
        about = "" if row.way == ALONE else "~"
        held = (row.weights, row.gradients, row.optimizer, row.activations, row.gathered, row.memory)
        shown.add_row(
            row.way,
            f"{row.processes:,}",
            *map(_short, held),
            str(row.collectives),
            _short(row.sent),
            about + _short(row.step_seconds * 1e3),
            f"{about}{row.images_per_second:,.0f}",
            f"{about}{row.efficiency:.0%}",
            end_section=row is plan.rows[-1] or plan.rows[plan.rows.index(row) + 1].way != row.way,
        )
    return shown


def curves(plan: Plan) -> dict[str, list[tuple[int, float, float]]]:
    """Of each way, from one process on: processes, MiB of each, images/s of all."""
    ways = dict.fromkeys(row.way for row in plan.rows[1:])
    return {
        way: [(row.processes, row.memory, row.images_per_second) for row in plan.rows if row.way in (ALONE, way)]
        for way in ways
    }


def lines(plan: Plan, options: PlanOptions) -> list[str]:
    """What the table rests on."""
    step = plan.steps[0]
    low, high = (seconds * 1e3 for seconds in step.spread)
    return [
        f"measured on {plan.device}: the step of one process, {step.images} images in {step.seconds * 1e3:,.1f} ms "
        f"({low:,.1f} to {high:,.1f}), and the activations that autograd keeps of it",
        "counted on the first of so many imagined processes (torch's fake group): what it holds, its collectives and "
        "their bytes; memory that a step takes and gives back as it runs is not in it",
        f"~ estimated: that step and, none of it hidden behind the backward pass, its collectives around a ring that "
        f"sends {options.link_gbps:g} Gb/s and takes {options.latency_us:g} us per message; an upper bound for the "
        "traffic, while the wrapper's own work and slower neighbours are left out",
        *(f"left out: {what}" for what in plan.left_out),
    ]


def _short(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"

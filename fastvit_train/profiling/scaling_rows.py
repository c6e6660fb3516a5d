"""What more machines would bring: memory, communication and time of a step against the number of processes.

What one process holds and exchanges is counted (collectives.py), the step of one is measured (planning.py); what a step
of many takes is estimated from both, here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table

from fastvit_train.models import OUR_MODELS, check_model
from fastvit_train.profiling.collectives import Share
from fastvit_train.utils.errors import UserError

OURS = "ours"
LARGEST = 4096
ALONE, DDP, FSDP2 = "alone", "DDP", "FSDP2"
HALF = 0.5
COLUMNS = (
    *("processes", "weights", "gradients", "optimizer", "activations", "gathered", "memory"),
    *("collectives", "sent", "step, ms", "img/s", "efficiency"),
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
    """One way to train on so many processes; memory and traffic are one process's."""

    way: str
    processes: int
    images: int
    """per process and step"""
    weights_mib: float
    gradients_mib: float
    optimizer_mib: float
    activations_mib: float
    gathered_mib: float
    memory_mib: float
    """all of these"""
    collectives: int
    sent_mib: float
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
    notes: list[str]
    """what is left out, and why"""
    conclusion: str


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
        way=way,
        processes=processes,
        images=step.images,
        weights_mib=share.weights / 2**20,
        gradients_mib=share.gradients / 2**20,
        optimizer_mib=share.optimizer / 2**20,
        activations_mib=step.activations / 2**20,
        gathered_mib=share.gathered / 2**20,
        memory_mib=sum(held) / 2**20,
        collectives=len(share.collectives),
        sent_mib=sent / 2**20,
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
        share = largest[FSDP2].memory_mib / largest[DDP].memory_mib
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
        caption="memory and sent: MiB of one process and step; img/s: of all processes",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    shown.add_column("", no_wrap=True)
    for name in COLUMNS:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        about = "" if row.way == ALONE else "~"
        held = (row.weights_mib, row.gradients_mib, row.optimizer_mib, row.activations_mib, row.gathered_mib)
        shown.add_row(
            row.way,
            f"{row.processes:,}",
            *map(_short, (*held, row.memory_mib)),
            str(row.collectives),
            _short(row.sent_mib),
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
        way: [(row.processes, row.memory_mib, row.images_per_second) for row in plan.rows if row.way in (ALONE, way)]
        for way in ways
    }


def lines(plan: Plan, options: PlanOptions) -> list[str]:
    """What the table rests on."""
    measured = (
        f"{step.images} img in {step.seconds * 1e3:,.1f} ms ({' to '.join(f'{s * 1e3:,.1f}' for s in step.spread)})"
        for step in plan.steps
    )
    return [
        f"measured: a step of one process on {plan.device}, {', '.join(measured)}, and the activations autograd keeps",
        "counted, on the first of so many imagined processes: the rest of the memory, without what comes and goes "
        "within a step; collectives and their bytes",
        f"~ estimated: that step, then its collectives around a ring, {options.link_gbps:g} Gb/s per process and "
        f"{options.latency_us:g} us per message, none of it hidden behind the backward pass",
        *plan.notes,
    ]


def _short(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"

"""Memory, communication and time of a training step for several numbers of processes.

What one rank holds and exchanges is counted (collectives.py), and the step of one process is measured (scaling.py).
This module estimates from both how long a step of many processes takes.
"""

from dataclasses import dataclass

from fastvit_train.profiling.collectives import RankCost
from fastvit_train.profiling.scaling_options import Link
from fastvit_train.utils.errors import counted

SINGLE, DDP, FSDP2 = "single", "DDP", "FSDP2"
MIN_EFFICIENCY = 0.5
"""Below it, adding processes is not worthwhile."""


@dataclass(frozen=True)
class MeasuredStep:
    """A training step of one process."""

    images: int
    seconds: float
    spread: tuple[float, float]
    """seconds per step of the fastest and of the slowest round"""
    activations: int
    """bytes that autograd saves in a forward pass for the backward pass"""


@dataclass(frozen=True)
class Row:
    """One strategy at one number of processes; memory and traffic are those of one process."""

    strategy: str
    processes: int
    images: int
    """per process and step"""
    weights_mib: float
    gradients_mib: float
    optimizer_mib: float
    activations_mib: float
    gathered_mib: float
    memory_mib: float
    """sum of the five above"""
    collectives: int
    sent_mib: float
    communication_seconds: float
    step_seconds: float
    images_per_second: float
    """of all processes together"""
    efficiency: float
    """images_per_second relative to the same number of processes without any communication"""


@dataclass(frozen=True)
class Plan:
    """The rows of one model."""

    model: str
    parameters: int
    device: str
    steps: list[MeasuredStep]
    """one for each number of images per process, in decreasing order, with and without a CUDA graph"""
    rows: list[Row]
    notes: list[str]
    """what is missing, and why"""
    conclusion: str


def estimate_row(
    strategy: str,
    processes: int,
    cost: RankCost,
    step: MeasuredStep,
    network: Link,
    single_rate: float | None = None,
) -> Row:
    """Estimate what a process holds and sends, and how long a step of all processes takes.

    Args:
        strategy: SINGLE, DDP or FSDP2.
        processes: the world size.
        cost: what one rank holds and exchanges.
        step: measured on one process, with the images that each process takes.
        network: its bandwidth and latency.
        single_rate: images/s of a single process; None if this row is that of a single process.
    """
    sent = sum(collective.sent(processes) for collective in cost.collectives)
    hops = sum(collective.hops(processes) for collective in cost.collectives)
    communication = 8 * sent / (network.gbps * 1e9) + hops * network.latency_us * 1e-6
    rate = processes * step.images / (step.seconds + communication)
    total = cost.weights + cost.gradients + cost.optimizer + step.activations + cost.gathered
    return Row(
        strategy=strategy,
        processes=processes,
        images=step.images,
        weights_mib=cost.weights / 2**20,
        gradients_mib=cost.gradients / 2**20,
        optimizer_mib=cost.optimizer / 2**20,
        activations_mib=step.activations / 2**20,
        gathered_mib=cost.gathered / 2**20,
        memory_mib=total / 2**20,
        collectives=len(cost.collectives),
        sent_mib=sent / 2**20,
        communication_seconds=communication,
        step_seconds=step.seconds + communication,
        images_per_second=rate,
        efficiency=rate / (processes * (single_rate or rate)),
    )


def conclude(rows: list[Row]) -> str:
    """Say up to how many processes each strategy is worthwhile, and how much memory sharding saves."""
    statements, last_rows = [], {}
    for strategy in (DDP, FSDP2):
        own = [row for row in rows if row.strategy == strategy]
        if own:
            last_rows[strategy] = own[-1]
            statements.append(_judge_strategy(strategy, own))
    if len(last_rows) == 2:
        ratio = last_rows[FSDP2].memory_mib / last_rows[DDP].memory_mib
        statements.append(
            f"at {counted(last_rows[FSDP2].processes, 'process')} FSDP2 needs {ratio:.0%} of DDP's memory"
        )
    return "; ".join(statements) or "only a single process was planned"


def _judge_strategy(strategy: str, rows: list[Row]) -> str:
    worthwhile = [row.processes for row in rows if row.efficiency >= MIN_EFFICIENCY]
    if len(worthwhile) == len(rows):
        return f"{strategy} has an efficiency of {rows[-1].efficiency:.0%} at {counted(rows[-1].processes, 'process')}"
    if worthwhile:
        return f"{strategy} has an efficiency below {MIN_EFFICIENCY:.0%} beyond {counted(max(worthwhile), 'process')}"
    return f"{strategy} has an efficiency below {MIN_EFFICIENCY:.0%} already at {counted(rows[0].processes, 'process')}"

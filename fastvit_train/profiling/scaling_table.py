"""A plan as a table, as the lines below it, and as curves."""

from rich import box
from rich.table import Table

from fastvit_train.profiling.scaling_estimate import SINGLE, Plan
from fastvit_train.profiling.scaling_options import PlanOptions
from fastvit_train.utils.errors import counted

COLUMNS = (
    *("processes", "weights", "gradients", "optimizer", "activations", "gathered", "memory"),
    *("collectives", "sent", "step, ms", "img/s", "efficiency"),
)


def plan_table(plan: Plan, options: PlanOptions) -> Table:
    """Build a table with a row for each strategy and number of processes."""
    first, last = plan.rows[0], max(plan.rows, key=lambda row: row.processes)
    size = f"{counted(first.images, 'image')} over all processes"
    if options.scaling == "weak":
        largest = f"{last.images * last.processes:,}"
        size = f"{counted(first.images, 'image')} per process, so that the batch grows to {largest}"
    table = Table(
        title=f"{plan.model}, {counted(plan.parameters, 'parameter')}; {options.scaling} scaling: {size}",
        caption="memory and sent: MiB per process and step; img/s: all processes together",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(plan.rows, (*plan.rows[1:], None), strict=True):
        mark = "" if row.strategy == SINGLE else "~"
        parts = (row.weights_mib, row.gradients_mib, row.optimizer_mib, row.activations_mib, row.gathered_mib)
        table.add_row(
            row.strategy,
            f"{row.processes:,}",
            *map(_format_number, (*parts, row.memory_mib)),
            str(row.collectives),
            _format_number(row.sent_mib),
            mark + _format_number(row.step_seconds * 1e3),
            f"{mark}{row.images_per_second:,.0f}",
            f"{mark}{row.efficiency:.0%}",
            end_section=following is None or following.strategy != row.strategy,
        )
    return table


def plan_curves(plan: Plan) -> dict[str, list[tuple[int, float, float]]]:
    """For each strategy, the points (processes, MiB per process, images/s of all), from a single process on."""
    strategies = dict.fromkeys(row.strategy for row in plan.rows[1:])
    return {
        strategy: [
            (row.processes, row.memory_mib, row.images_per_second)
            for row in plan.rows
            if row.strategy in (SINGLE, strategy)
        ]
        for strategy in strategies
    }


def format_sources(plan: Plan, options: PlanOptions) -> list[str]:
    """Say which numbers of the table are measured, which are counted and which are estimated."""
    network = options.network
    measured = (
        f"{step.images} img in {step.seconds * 1e3:,.1f} ms ({' to '.join(f'{s * 1e3:,.1f}' for s in step.spread)})"
        for step in plan.steps
    )
    return [
        f"measured: the step of a single process on {plan.device}, {', '.join(measured)}, and the activations that "
        "autograd saves",
        "counted, on rank 0 of simulated processes: the other parts of the memory, without temporary tensors; the "
        "collectives and the bytes that they send",
        f"~ estimated: the measured step followed by its ring collectives, at {network.gbps:g} Gb/s per process "
        f"and {network.latency_us:g} us per message, without overlap with the backward pass",
        *plan.notes,
    ]


def _format_number(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"

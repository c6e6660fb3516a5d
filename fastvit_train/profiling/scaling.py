"""The plan of a run: its step measured on one process, its collectives counted on many that aren't there."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch.nn.functional as F
from torch.profiler import record_function

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.inputs import build_train_loader
from fastvit_train.data.loader import RankInfo
from fastvit_train.distributed import accelerator, parallelize
from fastvit_train.profiling import collectives
from fastvit_train.profiling.collectives import Share
from fastvit_train.profiling.scaling_rows import (
    ALONE,
    DDP,
    FSDP2,
    Plan,
    PlanOptions,
    Step,
    checked,
    conclusion,
    curves,
    lines,
    row,
    table,
)
from fastvit_train.profiling.short_run import bar_of, make_output, short_run, timed_epoch
from fastvit_train.runs import plots
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.atomic_io import write_atomically
from fastvit_train.utils.console import Terminal
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import quartiles

ROUNDS = 3
TABLE_WIDTH = 120


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
        console = Terminal(width=TABLE_WIDTH, soft_wrap=True)
        console.print(table(plan, options))
        for line in (*lines(plan, options), f"planned in {time.perf_counter() - started:.0f} s", plan.conclusion):
            console.print(line, markup=False)
        plans.append(plan)
    found = {"scaling": options.scaling, "link_gbps": options.link_gbps, "latency_us": options.latency_us}
    text = json.dumps({**found, "plans": [asdict(plan) for plan in plans]}, indent=1)
    write_atomically(options.output / "plan.json", text + "\n")
    plots.plot_scaling({plan.model: curves(plan) for plan in plans}, options.output / "plan.png")
    print(f"written to {options.output}: plan.json, plan.png")
    return plans


def plan_model(config: TrainConfig, options: PlanOptions) -> Plan:
    """Measure and count for the model of `config`; `options` as `checked` leaves them."""
    with short_run(config, options.steps) as session:
        collectives.check_no_process_group()
        accum, notes = session.config.optim.grad_accum, []
        if session.config.run.compile:
            notes.append("activations are counted without --compile")
        images = dict.fromkeys(options.world_sizes, session.batch_size)
        if options.scaling == "strong":
            images = {n: session.batch_size // n for n in options.world_sizes if session.batch_size % (n * accum) == 0}
        if uncut := [f"{n:,}" for n in options.world_sizes if n not in images]:
            notes.append(f"left out: {', '.join(uncut)} processes, as {session.batch_size} images can't be cut evenly")
        ways: dict[str, Callable[[TrainSession, int], Share]] = {DDP: collectives.ddp}
        try:
            parallelize.check_shardable([collectives.BLOCK], session.bare_model, session.optimizer.optimizer)
            ways[FSDP2] = collectives.fsdp2
        except UserError as error:
            notes.append(f"left out: {FSDP2}, as {error}")
        steps = {count: measure(session, count, options.steps) for count in dict.fromkeys(images.values())}
        one = row(ALONE, 1, collectives.alone(session), steps[images[1]], options)
        rows = [one]
        for way, share in ways.items():
            several = (n for n in images if n > 1)
            rows += [row(way, n, share(session, n), steps[images[n]], options, one.images_per_second) for n in several]
        return Plan(
            session.config.model.model,
            sum(p.numel() for p in session.bare_model.parameters()),
            accelerator.device_name(session.accelerator.device),
            [*steps.values()],
            rows,
            notes,
            f"{session.config.model.model}: {conclusion(rows)}",
        )


def measure(session: TrainSession, images: int, steps: int) -> Step:
    """Train on batches of so many images, for some rounds of `steps` steps."""
    loader = build_train_loader(session.config, session.dataset, images, RankInfo(session.accelerator.device))
    loader.steps_per_epoch = min(steps, loader.steps_per_epoch)
    session = replace(session, train_loader=loader, batch_size=images)
    bar = bar_of(session)
    timed_epoch(session, bar, record_function)
    rounds = [timed_epoch(session, bar, record_function) for _ in range(ROUNDS)]
    return Step(images, quartiles(rounds).median, (min(rounds), max(rounds)), activations(session))


def activations(session: TrainSession) -> int:
    """Bytes that autograd keeps of a micro-batch's forward pass and loss for the backward pass."""
    model = copy.deepcopy(session.bare_model).train()  # a copy is not compiled
    images, labels = next(session.train_loader.micro_batches(0))

    def forward() -> None:
        with session.accelerator.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=session.config.optim.label_smoothing)

    return memory.saved_for_backward(forward, tuple(model.parameters()))

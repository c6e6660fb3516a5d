"""Where a training step's time goes: the run that the flags describe, measured for some steps."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env
from fastvit_train.profiling.roofline import count_flops, matmul_ceiling
from fastvit_train.profiling.short_run import bar_of, make_output, plain_model, short_run, timed_epoch
from fastvit_train.profiling.speedups import Candidate, autocast_dtype, measure_candidates
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.progress_bar import ProgressBar
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.timing import quartiles, synchronize

PHASES = ("input", "forward", "backward", "optimizer", "waiting")
HOST = "host"
"""what is left of a step: the loop itself"""
ROUNDS = 3
WORTH_SAYING = 1.05
LAUNCH_BOUND = 0.7
"""a run whose GPU computes for less of the time is called so"""


@dataclass
class Phases:
    """Seconds and peak memory of the parts of an epoch, given to `train_epoch` as its `phase`.

    Args:
        device: where the work is done.
        apart: wait for the device at each part's end, so that each part has its own device time and memory; without,
            the parts are the host's time, as it is in training.
    """

    device: torch.device
    apart: bool
    seconds: Counter[str] = field(default_factory=Counter)
    peak_mib: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.apart:
            memory.reset_peak_memory(self.device)
        started = time.perf_counter()
        yield
        if self.apart:
            synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started  # type: ignore[assignment]  # Counter counts in int
        if self.apart:
            self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), memory.peak_mib(self.device))


@dataclass(frozen=True)
class Profile:
    """What was found; times in seconds per step."""

    step: float
    spread: tuple[float, float]
    """the fastest and the slowest round's"""
    images_per_second: float
    phases: dict[str, float]
    """the host's time"""
    device_phases: dict[str, float]
    """each part's time with the device waited for at its end"""
    peak_mib: dict[str, float]
    kernels: float
    """per step: launched on the GPU; on a CPU calls of operators that call no other"""
    busy: float | None
    """share of the time in which the GPU computes; None on a CPU"""
    graph_breaks: int
    recompilations: int
    """compilations after the first epoch"""
    flops_per_image: float
    mfu: float
    candidates: list[Candidate]
    verdict: str


def profile_run(config: TrainConfig, steps: int, output: Path) -> Profile:
    """Train some steps of the run that `config` describes, print where their time goes, and write it to `output`.

    Args:
        config: of the run; nothing is written into its folder.
        steps: per round; there are some rounds.
        output: folder for profile.json and trace-rankN.json (open it in Chrome's about:tracing or ui.perfetto.dev).

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch, or an `output` that can't be
            written.
    """
    if env.sharded():
        raise UserError("profile measures a model that each process holds whole; launch it without FSDP")
    make_output(output)
    with short_run(config, steps) as session:
        result = _measure(session, output / f"trace-rank{session.accelerator.process_index}.json")
        if session.accelerator.is_main_process:
            (output / "profile.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
            session.log.console.print(table(result))
            for line in lines(result):
                session.log.line(line)
            session.log.line(f"written to {output}: profile.json, trace-rank0.json (for ui.perfetto.dev)")
            session.log.line(result.verdict)
    return result


def _measure(session: TrainSession, trace: Path) -> Profile:
    device, steps = session.accelerator.device, session.train_loader.steps_per_epoch
    bar = bar_of(session)
    timed_epoch(session, bar, Phases(device, apart=False))
    compiled = counters["stats"]["unique_graphs"]
    together = Phases(device, apart=False)
    rounds = [timed_epoch(session, bar, together) for _ in range(ROUNDS)]
    recompilations = counters["stats"]["unique_graphs"] - compiled
    graph_breaks = sum(counters["graph_break"].values())
    apart = Phases(device, apart=True)
    timed_epoch(session, bar, apart)
    kernels, busy_seconds = _trace(session, bar, trace)

    step = quartiles(rounds).median
    shares = {name: together.seconds[name] / steps / sum(rounds) for name in PHASES}
    phases = {name: step * share for name, share in {**shares, HOST: 1 - sum(shares.values())}.items()}
    busy = None if busy_seconds is None else min(1.0, busy_seconds / step)
    images = session.batch_size / session.accelerator.num_processes / step
    flops = flops_per_image(session)
    device_phases = {name: apart.seconds[name] / steps for name in PHASES[:-1]}
    share = input_share(step, phases, device_phases)
    candidates = [of_whole_step(candidate, share) for candidate in measure_candidates(session)]
    ceiling = matmul_ceiling(autocast_dtype(session.accelerator.mixed_precision) or torch.float32, device)
    return Profile(
        step,
        (min(rounds), max(rounds)),
        images * session.accelerator.num_processes,
        phases,
        device_phases,
        {name: apart.peak_mib[name] for name in PHASES[:-1]},
        kernels,
        busy,
        graph_breaks,
        recompilations,
        flops,
        flops * images / ceiling,
        candidates,
        verdict(busy, share, not isinstance(session.dataset.train.images, torch.Tensor), candidates),
    )


def _trace(session: TrainSession, bar: ProgressBar, path: Path) -> tuple[float, float | None]:
    """Write an epoch's Chrome trace; returns kernels per step, and on a GPU the seconds per step that they take."""
    on_gpu = session.accelerator.device.type == "cuda"
    steps = session.train_loader.steps_per_epoch
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _without_kinetos_chatter(), profile(activities=activities) as profiler:
        train_epoch(session, bar, record_function)
    session.state.close_epoch()
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    if on_gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and _computes(event)]
        return len(kernels) / steps, covered((k.time_range.start, k.time_range.end) for k in kernels) / 1e6 / steps
    leaves = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    return len(leaves) / steps, None


@contextmanager
def _without_kinetos_chatter() -> Iterator[None]:
    """Nothing on stderr: without a GPU torch's profiler calls it an error there that it finds none."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _computes(event: FunctionEvent) -> bool:
    """False for copies, for what waits for other GPUs, and for the marks of parts in a trace."""
    idle = event.name.lower().startswith(("nccl", "memcpy", "memset"))
    return not idle and not getattr(event, "is_user_annotation", False)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels of several streams may run at the same time."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def flops_per_image(session: TrainSession) -> float:
    """Of a forward and backward pass, by definition: unpadded, nothing recomputed."""
    model = plain_model(session)
    images, labels = next(session.train_loader.micro_batches(0))

    def run() -> None:
        F.cross_entropy(model(images[:2]), labels[:2]).backward()

    return count_flops(run) / 2


def input_share(step: float, host: dict[str, float], device: dict[str, float]) -> float:
    """Of a step, what the input holds up: the host, where it isn't waiting for the device anyway, or the device."""
    held_up = max(0.0, host["input"] - host["waiting"], device["input"] / sum(device.values()) * step)
    return min(held_up / step, 0.99)


def verdict(busy: float | None, input_share: float, streamed: bool, candidates: list[Candidate]) -> str:
    """What to change first, in a line: the most that something measured would bring to the whole step.

    A gain counts where the quartiles of its times and the present ones are apart; one that changes the training
    counts where nothing else does.
    """
    worth = [candidate for candidate in candidates if candidate.sure and candidate.gain >= WORTH_SAYING]
    best = max(worth, key=lambda candidate: (candidate.same_training, candidate.gain), default=None)
    free_input = 1 / (1 - input_share)
    if free_input >= max(WORTH_SAYING, best.gain if best else 0.0):
        how = "--stream never keeps the decoded images in memory" if streamed else "--crop and --cutout are its cost"
        return f"input-bound: it takes {input_share:.0%} of a step, without it {free_input:.1f}x at most ({how})"
    if best is None:
        return f"nothing that was tried makes it more than {WORTH_SAYING - 1:.0%} faster beyond the noise"
    bound = f"launch-bound, the GPU computes {busy:.0%} of the time: " if busy and busy < LAUNCH_BOUND else ""
    return f"{bound}{best.what} would help: measured {best.gain:.1f}x ({best.how})"


def of_whole_step(candidate: Candidate, input_share: float) -> Candidate:
    """A gain that was measured without the input, as one of the step with it."""
    if candidate.failed:
        return candidate
    return replace(candidate, gain=1 / (input_share + (1 - input_share) / candidate.gain))


def table(result: Profile) -> Table:
    """Times by part of a step."""
    shown = Table("per step", "host, ms", "share", "with the device's work, ms", "peak memory, MiB")
    for name, seconds in result.phases.items():
        device = result.device_phases.get(name)
        shown.add_row(
            name,
            f"{seconds * 1e3:,.2f}",
            f"{seconds / sum(result.phases.values()):.0%}",
            "" if device is None else f"{device * 1e3:,.2f}",
            f"{result.peak_mib[name]:,.0f}" if name in result.peak_mib else "",
        )
    return shown


def lines(result: Profile) -> list[str]:
    """What stands below the table."""
    low, high = (seconds * 1e3 for seconds in result.spread)
    busy = "" if result.busy is None else f", the GPU computes {result.busy:.0%} of the time"
    tried = ", ".join(str(candidate) for candidate in result.candidates)
    return [
        f"step {result.step * 1e3:,.2f} ms ({low:,.2f} to {high:,.2f}), {result.images_per_second:,.0f} img/s{busy}",
        f"{result.kernels:,.0f} kernels per step, {result.graph_breaks} graph breaks, "
        f"{result.recompilations} recompilations",
        f"{result.flops_per_image / 1e6:,.1f} MFLOP per image, {result.mfu:.1%} of the matrix products' ceiling (MFU)",
        f"tried, against the step as it is: {tried}",
    ]

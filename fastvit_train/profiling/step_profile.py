"""`profile`: where the time of a training step goes, measured on some steps of the configured run."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed import env
from fastvit_train.profiling.roofline import count_flops, matmul_ceiling
from fastvit_train.profiling.short_run import create_output_folder, eager_copy, make_progress_bar, short_run, time_epoch
from fastvit_train.profiling.speedups import Candidate, autocast_dtype, measure_candidates
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.graphed_step import without_graph
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.utils import atomic_io, memory
from fastvit_train.utils.errors import UserError, counted
from fastvit_train.utils.timing import quartiles, synchronize
from fastvit_train.utils.torch_private import count_compiled_graphs, count_graph_breaks

PHASES = ("input", "forward", "backward", "optimizer", "waiting")
GRAPH_PHASES = ("graph", "waiting")
"""of a step that is one CUDA graph"""
HOST = "host"
"""the rest of a step: the training loop itself"""
ROUNDS = 3
MIN_GAIN = 1.05
"""changes with smaller gains are not recommended"""
LAUNCH_BOUND_BUSY = 0.7
"""a run whose GPU computes for a smaller share of the time is launch-bound"""


@dataclass
class PhaseTimer:
    """Measures seconds and peak memory of the phases of an epoch; pass it to `train_epoch` as `phase`.

    Args:
        device: the device that trains.
        synchronized: True to wait for the device at the end of each phase, so that the device's time and memory are
            attributed to the phase that launched the work; False to measure the host's time without extra waits.
    """

    device: torch.device
    synchronized: bool
    seconds: Counter[str] = field(default_factory=Counter)
    peak_mib: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.synchronized:
            memory.reset_peak_memory(self.device)
        started = time.perf_counter()
        yield
        if self.synchronized:
            synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started  # type: ignore[assignment]  # Counter counts in int
        if self.synchronized:
            self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), memory.peak_mib(self.device))


@dataclass(frozen=True)
class Profile:
    """The results; times are seconds per step."""

    step: float
    spread: tuple[float, float]
    """of the fastest and of the slowest round"""
    images_per_second: float
    phases: dict[str, float]
    """the host's time in each phase"""
    device_phases: dict[str, float]
    """time of each phase, including the wait for the device at its end"""
    peak_mib: dict[str, float]
    kernels: float
    """per step: kernels launched on the GPU; on a CPU, calls of operators that do not call other operators"""
    busy: float | None
    """share of the time during which the GPU computes; None on a CPU"""
    graph_breaks: int
    recompilations: int
    """compilations after the first epoch"""
    flops_per_image: float
    mfu: float
    candidates: list[Candidate]
    verdict: str


def profile_run(config: TrainConfig, steps: int, output: Path) -> Profile:
    """Train some steps of the configured run, print where their time goes, and write it to `output`.

    Args:
        config: the run; nothing is written into its folder.
        steps: steps per round; several rounds are measured.
        output: folder for profile.json and trace-rankN.json, which Chrome's about:tracing and ui.perfetto.dev open.

    Raises:
        UserError: for anything wrong with the configuration, the data or the launch, or if `output` can't be written.
    """
    if env.uses_fsdp():
        raise UserError("profile can't measure a sharded model; launch it without FSDP")
    create_output_folder(output)
    with short_run(config, steps) as session:
        result = _measure(session, output / f"trace-rank{session.accelerator.process_index}.json")
        if session.accelerator.is_main_process:
            session.log.console.print(phase_table(result))
            for line in format_summary(result):
                session.log.line(line)
            session.log.line(result.verdict)
            with atomic_io.as_save_error(f"{output} cannot be written; choose another --output"):
                atomic_io.write_atomically(output / "profile.json", json.dumps(asdict(result), indent=1) + "\n")
            session.log.line(f"written to {output}: profile.json, trace-rank0.json (for ui.perfetto.dev)")
    return result


def _measure(session: TrainSession, trace: Path) -> Profile:
    device, steps = session.accelerator.device, session.train_loader.steps_per_epoch
    bar = make_progress_bar(session)
    time_epoch(session, bar, PhaseTimer(device, synchronized=False))
    compiled_graphs = count_compiled_graphs()
    host_timer = PhaseTimer(device, synchronized=False)
    rounds = [time_epoch(session, bar, host_timer) for _ in range(ROUNDS)]
    recompilations = count_compiled_graphs() - compiled_graphs
    graph_breaks = count_graph_breaks()
    device_timer = _time_phases(session, bar)
    kernels, busy_seconds = _trace(session, bar, trace)

    step = quartiles(rounds).median
    names = PHASES if session.graphed_step is None else GRAPH_PHASES
    shares = {name: host_timer.seconds[name] / steps / sum(rounds) for name in names}
    phases = {name: step * share for name, share in {**shares, HOST: 1 - sum(shares.values())}.items()}
    busy = None if busy_seconds is None else min(1.0, busy_seconds / step)
    images = session.batch_size / session.accelerator.num_processes / step
    flops = flops_per_image(session)
    device_phases = {name: device_timer.seconds[name] / steps for name in PHASES[:-1]}
    share = input_share(step, phases, device_phases)
    candidates = [include_input(candidate, share) for candidate in measure_candidates(session)]
    ceiling = matmul_ceiling(autocast_dtype(session.accelerator.mixed_precision) or torch.float32, device)
    return Profile(
        step,
        (min(rounds), max(rounds)),
        images * session.accelerator.num_processes,
        phases,
        device_phases,
        {name: device_timer.peak_mib[name] for name in device_phases},
        kernels,
        busy,
        graph_breaks,
        recompilations,
        flops,
        flops * images / ceiling,
        candidates,
        recommend(busy, share, not isinstance(session.dataset.train.images, torch.Tensor), candidates),
    )


def _time_phases(session: TrainSession, bar: ProgressBar) -> PhaseTimer:
    """Measure the phases on the device; a step that is one CUDA graph is launched in its parts instead."""
    if session.graphed_step is not None:
        session = without_graph(session)
        time_epoch(session, bar, PhaseTimer(session.accelerator.device, synchronized=False))  # compiles the parts
    timer = PhaseTimer(session.accelerator.device, synchronized=True)
    time_epoch(session, bar, timer)
    return timer


def _trace(session: TrainSession, bar: ProgressBar, path: Path) -> tuple[float, float | None]:
    """Write the Chrome trace of an epoch.

    Returns:
        Kernels per step, and the seconds per step during which the GPU runs at least one of them (None on a CPU).
    """
    on_gpu = session.accelerator.device.type == "cuda"
    steps = session.train_loader.steps_per_epoch
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _silence_stderr(), profile(activities=activities) as profiler:
        train_epoch(session, bar, record_function)
    session.state.close_epoch()
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    if on_gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and _computes(event)]
        return len(kernels) / steps, union_length((k.time_range.start, k.time_range.end) for k in kernels) / 1e6 / steps
    leaves = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    return len(leaves) / steps, None


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard what is written to stderr: without a GPU, torch's profiler reports its absence there as an error."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _computes(event: Any) -> bool:
    """Decide whether an event of the GPU is a computation: not a copy, a collective or a phase's annotation."""
    idle = event.name.lower().startswith(("nccl", "memcpy", "memset"))
    return not idle and not getattr(event, "is_user_annotation", False)


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of the intervals: kernels of several streams may run at the same time."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def flops_per_image(session: TrainSession) -> float:
    """Count the FLOPs of a forward and backward pass, without padding or recomputation."""
    model = eager_copy(session)
    images, labels = (tensor[:2] for tensor in next(session.train_loader.micro_batches(0)))

    def run() -> None:
        session.loss(model(images), labels).backward()

    return count_flops(run) / len(images)


def input_share(step: float, host: dict[str, float], device: dict[str, float]) -> float:
    """Return the share of a step that the input takes.

    It is the larger of two shares: the time that the device spends on the input, and the time that the host spends on
    it, less what the host waits for the device anyway.
    """
    seconds = max(0.0, host.get("input", 0.0) - host["waiting"], device["input"] / sum(device.values()) * step)
    return min(seconds / step, 0.99)


def recommend(busy: float | None, input_share: float, streamed: bool, candidates: list[Candidate]) -> str:
    """Say in one line what to change first: the change with the largest measured gain.

    A change whose gain is uncertain is not recommended, but if no other helps, the line names it. A change that affects
    the training is only recommended if no other helps.
    """
    faster = [candidate for candidate in candidates if round(candidate.gain, 2) >= MIN_GAIN]
    helpful = [candidate for candidate in faster if candidate.sure]
    best = max(helpful, key=lambda candidate: (candidate.same_training, candidate.gain), default=None)
    gain_without_input = 1 / (1 - input_share)
    if gain_without_input >= max(MIN_GAIN, best.gain if best else 0.0):
        how = (
            "with --stream never, the decoded images would stay in memory"
            if streamed
            else "most of that time goes to --crop and the other augmentations"
        )
        return (
            f"input-bound: the input takes {input_share:.0%} of a step; without it training would be at most "
            f"{gain_without_input:.2f}x as fast ({how})"
        )
    if best is None and faster:
        return (
            f"uncertain: {', '.join(candidate.measured for candidate in faster)} may help, but the times varied more "
            "than they differ; profile again when the machine has nothing else to do"
        )
    if best is None:
        return f"none of the measured changes makes training at least {MIN_GAIN - 1:.0%} faster"
    bound = f"launch-bound, the GPU computes {busy:.0%} of the time: " if busy and busy < LAUNCH_BOUND_BUSY else ""
    return f"{bound}{best.what} would help: measured {best.gain:.2f}x ({best.how})"


def include_input(candidate: Candidate, input_share: float) -> Candidate:
    """Convert a gain that was measured without the input into the gain of the whole step."""
    if candidate.failed:
        return candidate
    return replace(candidate, gain=1 / (input_share + (1 - input_share) / candidate.gain))


def phase_table(result: Profile) -> Table:
    """Build a table of time and memory by phase of a step."""
    table = Table("per step", "host, ms", "share", "host and device, ms", "peak memory, MiB")
    for name in {**result.device_phases, **result.phases}:  # a CUDA graph has no parts for the host
        seconds, device = result.phases.get(name), result.device_phases.get(name)
        table.add_row(
            name,
            "" if seconds is None else f"{seconds * 1e3:,.2f}",
            "" if seconds is None else f"{seconds / sum(result.phases.values()):.0%}",
            "" if device is None else f"{device * 1e3:,.2f}",
            f"{result.peak_mib[name]:,.0f}" if name in result.peak_mib else "",
        )
    return table


def format_summary(result: Profile) -> list[str]:
    """Format the lines below the table."""
    low, high = (seconds * 1e3 for seconds in result.spread)
    busy = "" if result.busy is None else f", the GPU computes {result.busy:.0%} of the time"
    candidates = ", ".join(str(candidate) for candidate in result.candidates)
    return [
        f"step {result.step * 1e3:,.2f} ms ({low:,.2f} to {high:,.2f}), {result.images_per_second:,.0f} img/s{busy}",
        f"{counted(round(result.kernels), 'kernel')} per step, {counted(result.graph_breaks, 'graph break')}, "
        f"{counted(result.recompilations, 'recompilation')}",
        f"{result.flops_per_image / 1e6:,.1f} MFLOP per image; MFU {result.mfu:.1%}, relative to a matrix product",
        f"changes, measured against the present step: {candidates}",
    ]

"""Started by accelerate in the tests: the step that GPUs record as a CUDA graph, in several processes.

Its arguments are the name of a case and settings. The first process ends with a line of JSON: what they all found.
"""

import functools
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.distributed import accelerator, env, parallelize
from fastvit_train.distributed.process_state import RandomStates
from fastvit_train.runs.run_folder import ResumeMode
from fastvit_train.training import graphed_step
from fastvit_train.training.checkpointing import save_checkpoint
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.graphed_step import GraphedStep, build_tables, device_step, without_graph
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from tests.support import null_gpu

prepare = parallelize.prepare


def start(settings: dict[str, Any], name: str, use_ddp: bool, resume: ResumeMode = "never") -> TrainSession:
    """Set a run up; the ranks build different weights."""

    def prepare_different(own: Any, model: nn.Module, optimizer: Any, **_: Any) -> Any:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * own.process_index)
        return prepare(own, model, optimizer, use_ddp=use_ddp)

    parallelize.prepare = prepare_different
    return setup(override(recipe("quickstart"), {**settings, "exp_name": name}, "the test"), resume, False)


def with_device_step(session: TrainSession) -> TrainSession:
    """Replace the step by the function that a GPU records, without the recording."""
    tables = build_tables(session)
    return replace(session, graphed_step=GraphedStep(device_step(session, tables), tables))


def train(session: TrainSession) -> dict[str, Any]:
    """Train an epoch; each rank drops its own activations."""
    torch.manual_seed(10 * session.state.epoch + session.accelerator.process_index)
    train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
    found = {"losses": session.state.epoch_losses, "correct": session.state.epoch_correct}
    session.state.close_epoch()
    models = [session.bare_model, *([session.ema.module] if session.ema else [])]
    weights = torch.cat([p.detach().flatten() for model in models for p in model.parameters()])
    highest, lowest = weights.clone(), weights.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return {**found, "norm": float(weights.norm()), "spread": float((highest - lowest).max())}


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Two epochs by the loop with DDP; and one by the step, from whose checkpoint the loop with DDP goes on."""
    with closing(start(settings, "loop", use_ddp=True)) as session:
        expected = [train(session), train(session)]
    with closing(start(settings, "step", use_ddp=False)) as session:
        session = with_device_step(session)
        found = [train(session)]
        save_checkpoint(session)
    with closing(start(settings, "step", use_ddp=True, resume="must")) as session:
        found.append(train(session))
    return {"expected": expected, "found": found}


def fail_on_one_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """Let one rank alone fail to record the step without the exchange; the loop with DDP takes over."""
    tried = []

    def record(run: Callable[[], None], **_: Any) -> None:
        tried.append(run)
        if env.get("RANK", "0") == "1":
            raise RuntimeError("no memory\nfor a graph")
        run()

    graphed_step.record_graph = record
    with closing(start(settings, "loop", use_ddp=True)) as session:
        expected = train(session)
    with closing(start(settings, "failed", use_ddp=False)) as session:
        graph, reason = graphed_step._record_on_all_ranks([session], [build_tables(session)], RandomStates(1))
        found = train(without_graph(session))
    every: list[Any] = [None, None]
    dist.all_gather_object(every, [graph is None, reason, len(tried)])
    return {"outcomes": every, "expected": expected, "found": found}


def count_launches(settings: dict[str, Any]) -> dict[str, Any]:
    """On null CUDA devices: what recording a step and launching it five times asks of the device of this process."""
    null_gpu.accept_any_value(pytest.MonkeyPatch())
    exchange_objects_by_gloo()
    with null_gpu.counted() as recording:
        session = setup(override(recipe("quickstart"), settings, "the test"), "never", False)
    with closing(session):
        if session.graphed_step is None:
            return {"recorded": False}
        session.graphed_step.start_epoch(session, session.graphed_step.tables.totals)
        with null_gpu.counted() as steps:
            for _ in range(5):
                session.graphed_step.launch()
    return {
        "recorded": True,
        "sums": recording.launched["nccl allreduce"],
        "nodes": recording.captured.total(),
        "graphs": steps.calls["cudaGraphLaunch"],
        "launches": steps.launched.total(),
        "synchronisations": steps.synchronisations,
        "violations": recording.violations + steps.violations,
    }


def exchange_objects_by_gloo() -> None:
    """Pickled objects pass through kernels before NCCL sends them, and a null device computes none."""
    every, first = dist.all_gather_object, dist.broadcast_object_list
    group = functools.cache(lambda: dist.new_group(backend="gloo"))
    dist.all_gather_object = lambda objects, own: every(objects, own, group())
    dist.broadcast_object_list = lambda objects, src: first(objects, src, group(), torch.device("cpu"))


if __name__ == "__main__":
    cases = {"compare": compare, "fail_on_one_rank": fail_on_one_rank, "count_launches": count_launches}
    result = cases[sys.argv[1]](json.loads(sys.argv[2]))
    if env.is_rank0():
        print(json.dumps(result))
    accelerator.leave_process_group()

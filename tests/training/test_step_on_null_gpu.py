"""What a training step asks of a GPU, counted on a null CUDA device."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import timm
import torch

from fastvit_train.config.schema import OptimConfig, TrainConfig
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.optim.muon import Muon
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.training.session import TrainSession
from fastvit_train.training.setup import setup
from tests.support import null_gpu

Config = Callable[..., TrainConfig]


def count_parts(session: TrainSession) -> dict[str, list[null_gpu.Counts]]:
    """Train an epoch; returns the counts of each part of the steps, in order."""
    parts: dict[str, list[null_gpu.Counts]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with null_gpu.counted() as counts:
            yield
        parts.setdefault(name, []).append(counts)

    train_epoch(session, ProgressBar(session.log.console, 1, 1, 1), phase)
    return parts


@pytest.mark.nullgpu
@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "adamw"},
        {"optimizer": "nmuon"},
        {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "trivial", "color_jitter": 0.3, "random_erasing": 0.5}
        | {"sampler": "balanced", "class_weights": "auto"},
    ],
    ids=["adamw", "nmuon", "mixed"],
)
def test_no_part_of_an_eager_step_synchronises(small_config: Config, more: dict[str, Any]) -> None:
    settings = {"clip_grad": 1.0, "label_smoothing": 0.1, "crop": "resized", "cutout": 2, **more}
    with ExitStack() as stack:
        session = setup(small_config(attention="triton", **settings), "never", overwrite=False)
        stack.callback(session.close)
        parts = count_parts(session)
    steps = session.train_loader.steps_per_epoch
    for name in ("input", "forward", "backward", "optimizer"):
        assert len(parts[name]) == steps
        first, *others = parts[name]
        assert first.launched.total() > 0
        assert [(counts.synchronisations, counts.violations) for counts in others] == [(0, 0)] * (steps - 1), name
    assert sum(counts.synchronisations for counts in parts["waiting"]) > 0  # so waiting does show


@pytest.mark.nullgpu
def test_the_optimizer_of_a_small_model_takes_ten_launches_and_none_waits() -> None:
    model = timm.create_model("mc_vit_4_4_32").cuda()
    optimizer = build_optimizer(model, OptimConfig(optimizer="nmuon"))
    assert isinstance(optimizer, Muon)
    optimizer.compile_kernels()
    assert not optimizer.state
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for lr in (0.01, torch.tensor(0.01, device="cuda")):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()  # creates the state
        with null_gpu.counted() as counts:
            optimizer.step()
        assert 0 < counts.launched.total() <= 10 and counts.synchronisations == 0
    graph = torch.cuda.CUDAGraph()
    with null_gpu.counted() as counts, torch.cuda.graph(graph):
        optimizer.step()
    assert 0 < counts.captured.total() <= 10 and counts.violations == 0


@pytest.mark.nullgpu
def test_muon_under_a_scaler_does_not_wait() -> None:
    """Matrices that fit the kernel, and larger ones."""
    weights = [torch.nn.Parameter(torch.ones(*shape, device="cuda")) for shape in ((48, 48), (256, 128), (48,))]
    optimizer, scaler = Muon(weights), torch.amp.GradScaler("cuda")
    for _ in range(2):
        scaler.scale(sum(weight.sum() for weight in weights)).backward()
        with null_gpu.counted() as counts:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    assert counts.launched.total() > 0 and counts.synchronisations == 0


@pytest.mark.nullgpu
def test_a_resumed_muon_takes_steps_on_a_gpu() -> None:
    def take_step(optimizer: torch.optim.Optimizer) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()

    first, resumed = (Muon([torch.nn.Parameter(torch.ones(*s, device="cuda")) for s in ((8, 8), (8,))]) for _ in "ab")
    take_step(first)
    saved = first.state_dict()
    for state in saved["state"].values():  # a checkpoint is read to the CPU
        state.update({name: value.cpu() for name, value in state.items()})
    resumed.load_state_dict(saved)
    take_step(resumed)

"""What a training step asks of a GPU, counted on a null CUDA device."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fastvit_train.config.schema import TrainConfig
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.progress_bar import ProgressBar
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
@pytest.mark.parametrize("optimizer", ["adamw", "nmuon"])
def test_no_part_of_an_eager_step_synchronises(small_config: Config, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "clip_grad": 1.0, "label_smoothing": 0.1, "crop": "resized", "cutout": 2}
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

"""Models with batch norm, whose running statistics each rank takes from its own images."""

from pathlib import Path

import pytest

from fastvit_train.inference.evaluate import evaluate
from fastvit_train.runs.results import read_summary
from tests.support import launch


@pytest.mark.slow
def test_two_processes_evaluate_the_weights_that_are_saved(tmp_path: Path) -> None:
    settings = (
        "--model",
        "test_resnet",
        "--image-size",
        32,
        "--epochs",
        1,
        "--runs-dir",
        tmp_path,
        "--exp-name",
        "run",
    )
    done = launch(*settings, "--ema", 0.5, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(tmp_path / "run")
    assert evaluate(tmp_path / "run").loss == pytest.approx(summary["test_loss"], rel=1e-5)

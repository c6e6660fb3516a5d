"""--extend: a finished run is trained further, and its schedule begins again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError

SmallConfig = Callable[..., TrainConfig]
SETTINGS = {"epochs": 2, "mixup": 0.2, "ema": 0.9, "average_last": 1, "flip": "alternating", "warmup": 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["nmuon", "adamw"])
def test_a_run_that_is_extended_twice_is_the_run_that_was_planned_so(
    small_config: SmallConfig, tmp_path: Path, optimizer: str
) -> None:
    settings = {**SETTINGS, "optimizer": optimizer}
    fit(small_config(exp_name="planned", extend=(2, 1), **settings))
    fit(small_config(exp_name="extended", **settings))
    fit(small_config(exp_name="extended", extend=(2,), stop_after=3, **settings), resume="must")
    fit(small_config(exp_name="extended", extend=(2,), **settings), resume="must")
    summary = fit(small_config(exp_name="extended", extend=(2, 1), **settings), resume="must")
    assert summary["epochs"] == 5 and summary["final_weights"] == "average"
    planned, extended = (tmp_path / "runs" / name for name in ("planned", "extended"))
    weights = load_file(extended / "model.safetensors")
    for name, value in load_file(planned / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    assert (planned / "steps.jsonl").read_text() == (extended / "steps.jsonl").read_text()
    assert RunFolder(extended).read_config()["extend"] == [2, 1]


@pytest.mark.slow
def test_the_schedule_begins_again_and_says_so(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(epochs=2, warmup=0.0, schedule="linear", lr=0.004))
    fit(small_config(epochs=2, warmup=0.0, schedule="linear", lr=0.004, extend=(4,)), resume="must")
    rates = [row["learning_rate"] for row in read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.002, 0, 0.003, 0.002, 0.001, 0])
    log = (tmp_path / "runs" / "run" / "train.log").read_text()
    assert (
        "extended by 4 epochs: the linear schedule begins again at epoch 3, with a peak learning rate of 0.004" in log
    )
    assert "epoch   6/6" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"stop_after": 1}, {"extend": (1,)}, "has trained 1 of its 2 epochs; finish it before --extend"),
        ({"extend": (1,)}, {"extend": (2,)}, "was extended with --extend 1; repeat these numbers before any others"),
        ({"extend": (1,)}, {}, "was extended with --extend 1; repeat these numbers before any others"),
        ({}, {"extend": (0,)}, "--extend 0 is out of range; allowed: at least 1, at most 1,000,000"),
        ({}, {"extend": (1,), "patience": 1}, "--patience decides when the run ends.*give one of them"),
        (
            {"average_last": 2},
            {"extend": (1,), "average_last": 2},
            "--average-last 2 needs more epochs than --extend 1",
        ),
    ],
    ids=["unfinished", "changed", "left out", "no epochs", "patience", "average"],
)
def test_what_does_not_fit_the_run_is_refused(
    small_config: SmallConfig, tmp_path: Path, first: dict[str, object], then: dict[str, object], message: str
) -> None:
    fit(small_config(**{"epochs": 2, **first}))
    before = (tmp_path / "runs" / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=message):
        fit(small_config(**{"epochs": 2, **then}), resume="must")
    assert (tmp_path / "runs" / "run" / "config.yaml").read_text() == before

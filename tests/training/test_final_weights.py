"""--patience, --keep-best-of and --average-last: which epoch is the best one, and what a run ends with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.inference.trained_model import load_run
from fastvit_train.models.evaluator import Evaluation
from fastvit_train.models.resolve import resolve
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import loop
from fastvit_train.training.loop import fit
from fastvit_train.training.optim import final_weights
from fastvit_train.training.seeds import fit_seeds
from fastvit_train.utils.errors import UserError
from tests.config.test_settings_file import change_checkpoints

SmallConfig = Callable[..., TrainConfig]
LABELS = torch.tensor([0] * 8 + [1] * 2)


def evaluation(predicted: list[int], loss: float) -> Evaluation:
    classes, ones = torch.tensor(predicted), torch.ones(10)
    return Evaluation(LABELS, classes, ones, ones * loss, (classes != LABELS).long(), 2)


# by epoch: the most accurate, the one with the best balanced accuracy, that with the lowest loss, and two bad ones
EVALUATIONS = [
    evaluation([0] * 8 + [0, 0], 0.9),
    evaluation([0] * 5 + [1] * 3 + [1, 1], 0.8),
    evaluation([1] * 8 + [0, 0], 0.5),
    evaluation([1] * 8 + [0, 0], 0.7),
    evaluation([1] * 8 + [0, 0], 0.7),
]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the evaluation after each epoch have the results above."""
    results: Iterator[Evaluation] = iter(EVALUATIONS)
    real = loop.evaluate_model

    def evaluate_model(*arguments: Any) -> Evaluation:
        is_epoch = len(arguments) == 4
        return next(results) if is_epoch else real(*arguments)

    monkeypatch.setattr(loop, "evaluate_model", evaluate_model)


def epochs_of(run: Path) -> list[int]:
    return [row["epoch"] for row in read_jsonl(run / "metrics.jsonl")]


def same(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("measure", "best"), [("accuracy", 1), ("balanced", 2), ("loss", 3)])
def test_the_best_epoch_is_the_one_asked_for_and_patience_ends_with_its_weights(
    small_config: SmallConfig, tmp_path: Path, measure: str, best: int
) -> None:
    summary = fit(small_config(epochs=20, keep_best_of=measure, patience=2, save_model_every=1))
    run = tmp_path / "runs" / "run"
    assert epochs_of(run) == list(range(1, best + 3))
    assert summary["epochs"] == best + 2 and summary["final_weights"] == "best epoch"
    assert same(run / "model.safetensors", run / f"model_epoch_{best}.safetensors")
    assert not same(run / "model.safetensors", run / f"model_epoch_{best + 1}.safetensors")
    assert (run / "checkpoints" / "best").resolve().name == f"step_{best * 5}"
    assert summary["best_test_accuracy"] == 0.8
    log = (run / "train.log").read_text()
    assert f"the final weights are those of epoch {best}, the best one" in log
    assert ("accuracy 70.00%  balanced 81.25%" in log) == (measure == "balanced")
    for name, epoch in (("best", best), ("last", best + 2)):
        chosen = load_run(run, checkpoint=name, device="cpu")
        assert chosen.checkpoint is not None and chosen.checkpoint.epoch == epoch
        expected = load_file(run / f"model_epoch_{epoch}.safetensors")
        assert all(torch.equal(value, expected[key]) for key, value in chosen.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_summary_is_about_the_best_epochs_weights(
    small_config: SmallConfig, tmp_path: Path, ema: float | None
) -> None:
    """A learning rate that grows out of hand makes the first epochs the best ones."""
    summary = fit(small_config(epochs=30, lr=0.05, optimizer="sgd", momentum=0.99, patience=3, ema=ema))
    run = tmp_path / "runs" / "run"
    rows = read_jsonl(run / "metrics.jsonl")
    best = max(rows, key=lambda row: (row["test_accuracy"], -row["epoch"]))
    assert len(rows) == best["epoch"] + 3 < 30
    assert summary["test_accuracy"] == best["test_accuracy"] == summary["best_test_accuracy"]
    assert summary["test_loss"] == pytest.approx(best["test_loss"], abs=1e-6)
    assert evaluate(run).accuracy == summary["test_accuracy"]


@pytest.mark.slow
def test_stopped_and_resumed_ends_alike(small_config: SmallConfig, tmp_path: Path) -> None:
    settings = {"lr": 0.05, "optimizer": "sgd", "momentum": 0.99, "patience": 1, "epochs": 30, "mixup": 0.2, "ema": 0.5}
    settings |= {"sampler": "balanced"}
    whole = fit(small_config(exp_name="whole", **settings))
    assert 3 < whole["epochs"] < 30
    fit(small_config(exp_name="parts", stop_after=2, **settings))
    fit(small_config(exp_name="parts", stop_after=whole["epochs"] - 1, **settings), resume="must")
    parts = fit(small_config(exp_name="parts", **settings), resume="must")
    again = fit(small_config(exp_name="parts", **settings), resume="must")  # nothing is left to train
    runs = tmp_path / "runs"
    assert parts["epochs"] == again["epochs"] == whole["epochs"]
    assert same(runs / "whole" / "model.safetensors", runs / "parts" / "model.safetensors")
    assert (runs / "whole" / "steps.jsonl").read_text() == (runs / "parts" / "steps.jsonl").read_text()
    assert parts["test_loss"] == again["test_loss"] == whole["test_loss"]


@pytest.mark.slow
def test_weights_of_another_epoch_are_not_taken_for_the_best(small_config: SmallConfig, tmp_path: Path) -> None:
    settings = {"lr": 0.0, "patience": 1, "epochs": 30}
    fit(small_config(**settings))
    run = tmp_path / "runs" / "run"
    (run / "best.safetensors").unlink()
    summary = fit(small_config(**settings), resume="must")
    assert summary["final_weights"] == "last epoch"
    assert "best.safetensors is not that of epoch" in (run / "train.log").read_text()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_norm_is_averaged_too(device: str, small_config: SmallConfig) -> None:
    """Its count of batches is an integer."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).to(device)
    average = final_weights.build_average(model, resolve(small_config(average_last=2)))
    for weight in (1.0, 2.0):
        torch.nn.init.constant_(model[0].weight, weight)
        model(torch.randn(3, 2, device=device))
        average.update_parameters(model)
    assert average.module[0].weight.tolist() == [1.5, 1.5]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_average_is_that_of_the_last_epochs(small_config: SmallConfig, tmp_path: Path, ema: float | None) -> None:
    settings = {"epochs": 4, "average_last": 3, "save_model_every": 1, "ema": ema}
    summary = fit(small_config(exp_name="whole", **settings))
    fit(small_config(exp_name="parts", stop_after=3, **settings))
    fit(small_config(exp_name="parts", **settings), resume="must")
    run = tmp_path / "runs" / "whole"
    epochs = [load_file(run / f"model_epoch_{epoch}.safetensors") for epoch in (2, 3, 4)]
    for name, value in load_file(run / "model.safetensors").items():
        expected = torch.stack([weights[name].double() for weights in epochs]).mean(0).float()
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-6)
    assert same(run / "model.safetensors", tmp_path / "runs" / "parts" / "model.safetensors")
    assert summary["final_weights"] == "average" and evaluate(run).loss == pytest.approx(summary["test_loss"])
    last = load_run(run, checkpoint="last", device="cpu").model.state_dict()
    assert all(torch.equal(last[name], value) for name, value in epochs[-1].items())


@pytest.mark.slow
def test_a_target_that_only_the_average_reaches_has_a_time(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_epochs, of_average = EVALUATIONS[3], EVALUATIONS[0]
    monkeypatch.setattr(loop, "evaluate_model", lambda *args: after_epochs if len(args) == 4 else of_average)
    summary = fit(small_config(epochs=3, average_last=2, target_accuracy=0.5))
    assert summary["epochs_to_target"] == 3 and summary["test_accuracy"] == 0.8
    assert summary["seconds_to_target"] == summary["train_seconds"] + summary["eval_seconds"]
    rows = read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert summary["eval_seconds"] > sum(row["eval_seconds"] for row in rows)


@pytest.mark.slow
def test_a_run_that_is_not_finished_has_its_last_weights(small_config: SmallConfig, tmp_path: Path) -> None:
    summary = fit(small_config(epochs=3, average_last=3, stop_after=2, save_model_every=1))
    run = tmp_path / "runs" / "run"
    assert summary["final_weights"] == "last epoch"
    assert same(run / "model.safetensors", run / "model_epoch_2.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2, "average_last": 2}, "give one of them"),
        ({"average_last": 4}, "--average-last 4 needs more epochs than --epochs 3"),
        ({"patience": 0}, "--patience 0 is out of range"),
        ({"keep_best_of": "f1"}, "allowed: accuracy, balanced, loss"),
    ],
)
def test_contradictions_are_refused(
    small_config: SmallConfig, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(small_config(epochs=3, **settings))
    assert not (tmp_path / "runs").exists()


def test_seeds_that_train_together_cannot_stop_apart(small_config: SmallConfig) -> None:
    with pytest.raises(UserError, match="leave it or --patience out"):
        fit_seeds(small_config(patience=2), 2, together=True)


@pytest.mark.slow
def test_an_older_checkpoint_knows_its_best_epoch(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(stop_after=1))
    run = tmp_path / "runs" / "run"
    change_checkpoints(run, lambda saved: saved["progress"].pop("best_score"))
    fit(small_config(), resume="must")
    progress = json.loads((run / "checkpoints" / "last" / "progress.json").read_text())["progress"]
    assert progress["best_score"] == progress["best_accuracy"]

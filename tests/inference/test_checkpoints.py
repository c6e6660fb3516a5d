"""The best, the last and every saved checkpoint of a run can be used, and it is said which epoch it is from."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastvit_train
from fastvit_train.cli.main import main
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.inference.push import push_run
from fastvit_train.inference.trained_model import load_run
from fastvit_train.models import evaluator
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training import loop
from fastvit_train.utils.errors import UserError
from tests.support import one_line_error

pytestmark = pytest.mark.slow
SMALL = {
    "epochs": 4,
    "batch_size": 240,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 8,
    "attention": "fused",
    "exp_name": "run",
}
STEPS = 5
"""steps per epoch"""
BEST_EPOCH = 2


@pytest.fixture(scope="module", params=[None, 0.5], ids=["plain", "ema"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose second epoch is the best: in the others, no image counts as classified correctly."""
    runs = tmp_path_factory.mktemp("runs")
    epochs = iter(range(1, SMALL["epochs"] + 1))

    def evaluate_model(*arguments: Any) -> evaluator.Evaluation:
        result = evaluator.evaluate_model(*arguments)
        return result if next(epochs) == BEST_EPOCH else dataclasses.replace(result, predicted=(result.labels + 1) % 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_model", evaluate_model)
        patch.setenv("OMP_NUM_THREADS", "1")
        loop.fit(override(recipe("quickstart"), {**SMALL, "ema": request.param, "runs_dir": str(runs)}, "the test"))
    yield runs / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def weights(run: Path, **options: Any) -> torch.Tensor:
    model = load_run(run, device="cpu", **options).model
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def accuracy(run: Path, epoch: int) -> float:
    return float(read_jsonl(run / "metrics.jsonl")[epoch - 1]["test_accuracy"])


def test_the_best_checkpoint_is_that_of_the_best_epoch(run: Path) -> None:
    evaluated = evaluate_run(run, checkpoint="best")
    assert evaluated.evaluation.accuracy == accuracy(run, BEST_EPOCH) > 0
    chosen = evaluated.run.checkpoint
    assert (chosen.name, chosen.epoch, chosen.step) == ("best", BEST_EPOCH, BEST_EPOCH * STEPS)
    expected = f"checkpoint best: epoch 2 (step {BEST_EPOCH * STEPS}), accuracy {chosen.accuracy:.2%} during training"
    assert str(chosen) == expected
    assert not torch.equal(weights(run, checkpoint="best"), weights(run))


def test_names_and_steps(run: Path) -> None:
    assert torch.equal(weights(run, checkpoint="last"), weights(run))
    assert torch.equal(weights(run, checkpoint=4 * STEPS), weights(run))
    assert torch.equal(weights(run, checkpoint=str(BEST_EPOCH * STEPS)), weights(run, checkpoint="best"))
    assert load_run(run, checkpoint="last").checkpoint.epoch == 4
    assert load_run(run).checkpoint is None


def test_the_best_weights_are_in_the_runs_folder(run: Path) -> None:
    model = load_run(run, device="cpu", checkpoint="best").model.state_dict()
    best = load_file(run / "best.safetensors")
    assert best.keys() == model.keys()
    assert all(torch.equal(best[name], model[name]) for name in best)


@pytest.mark.parametrize("name", ["worst", "7", "-1", "", "../run", "step_10", "1e1"])
def test_an_unknown_checkpoint_is_one_line_that_lists_those_that_exist(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), f"--checkpoint={name}"])
    assert stop.value.code == 2
    listed = "best (epoch 2), last (epoch 4), 10 (epoch 2), 15 (epoch 3), 20 (epoch 4)"
    assert one_line_error(capsys.readouterr().err) == f"{run} has no checkpoint {name!r}; it has: {listed}"
    assert not (run / "eval").exists()


def test_a_run_of_an_earlier_version_and_without_links(run: Path) -> None:
    best = weights(run, checkpoint="best")
    stale = load_file(run / "model.safetensors")
    save_file(stale, run / "best.safetensors", {"step": "5"})  # as if the disk had been full after the second epoch
    assert torch.equal(weights(run, checkpoint="best"), best)
    (run / "best.safetensors").unlink()
    for link in ("best", "last"):
        (run / "checkpoints" / link).unlink()
    assert torch.equal(weights(run, checkpoint="best"), best)
    assert torch.equal(weights(run, checkpoint="last"), weights(run))


def test_a_run_in_training(run: Path) -> None:
    last = weights(run)
    for name in ("model.safetensors", "summary.json"):
        (run / name).unlink()
    with pytest.raises(UserError, match="is not finished; .* --checkpoint best or last"):
        load_run(run)
    assert torch.equal(weights(run, checkpoint="last"), last)
    assert load_run(run, checkpoint="best").class_names == tuple("0123456789")


def test_a_run_continued_after_it_was_finished(run: Path) -> None:
    """`last` is what was trained last, though the final weights of the first part are still there."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "steps": 3 * STEPS}))
    assert load_run(run, checkpoint="last").checkpoint.path.parent == run / "checkpoints" / "step_20"


def test_damage_is_one_line(run: Path) -> None:
    for path in (run / "checkpoints" / "step_10").glob("model*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"step_10 is damaged \(model.* choose another --checkpoint"):
        load_run(run, checkpoint="10")
    (run / "best.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="step_10 is damaged"):
        load_run(run, checkpoint="best")
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no checkpoint 'best'; it has: none"):
        load_run(run, checkpoint="best")


@pytest.mark.parametrize(
    ("verb", "arguments", "written"),
    [
        ("eval", [], "eval-best/evaluation.json"),
        ("predict", ["{image}", "--json", "--show"], "predictions-best/1.png"),
        ("inspect", ["{image}"], "inspect-best/attention-maps.png"),
        ("export", ["--to", "safetensors"], "export-best/model.safetensors"),
        ("push", ["me/digits", "--dry-run"], "hub-best/README.md"),
    ],
)
def test_every_verb_takes_it_and_says_which_epoch_it_is(
    verb: str, arguments: list[str], written: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "gray").save(image)
    main([verb, str(run), *(word.format(image=image) for word in arguments), "--checkpoint", "best"])
    captured = capsys.readouterr()
    said = captured.out if verb == "eval" else captured.err
    assert f"checkpoint best: epoch 2 (step 10), accuracy {accuracy(run, 2):.2%} during training\n" in said
    assert (run / written).is_file()
    if verb == "predict":
        assert [json.loads(line)["image"] for line in captured.out.splitlines()] == [str(image)]


def test_a_model_card_has_the_accuracy_of_the_checkpoint(run: Path) -> None:
    folder = Path(push_run(str(run), "me/digits", dry_run=True, checkpoint="best"))
    card = (folder / "README.md").read_text()
    assert "name: accuracy of epoch 2" in card
    assert f"value: {round(accuracy(run, 2), 6)}" in card
    assert "The weights are those of checkpoint best: epoch 2 (step 10)" in card
    best = load_file(run / "best.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in load_file(folder / "model.safetensors").items())


def test_evaluation_from_python_and_what_it_records(run: Path) -> None:
    assert fastvit_train.evaluate(run, checkpoint="best").accuracy == accuracy(run, 2)
    main(["eval", str(run), "--checkpoint", "best"])
    recorded = json.loads((run / "eval-best" / "evaluation.json").read_text())
    assert recorded["checkpoint"] == {"name": "best", "epoch": 2, "step": 10}


def test_a_checkpoint_of_images_that_are_not_square_is_loaded_as_it_is(
    small_config: Callable[..., Any], tmp_path: Path
) -> None:
    """16 patches, in 2 rows of 8: a state dict does not say that they are not 4 rows of 4."""
    loop.fit(small_config(image_size="16x64", epochs=1, dataset="synthetic", save_every=1))
    run = tmp_path / "runs" / "run"
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert torch.equal(weights(run, checkpoint=steps), weights(run))
    file = str(run / "checkpoints" / f"step_{steps}" / "model.safetensors")
    loop.fit(small_config(image_size="16x64", epochs=1, dataset="synthetic", weights=file, lr=0, exp_name="again"))
    assert torch.equal(weights(tmp_path / "runs" / "again"), weights(run))


def test_only_runs_have_checkpoints(timms: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoints, so leave --checkpoint best out; only a run's folder has"):
        load_run(f"local-dir:{timms}", checkpoint="best")


def test_a_checkpoint_within_an_epoch(small_config: Callable[..., Any], tmp_path: Path) -> None:
    loop.fit(small_config(epochs=1, save_every=4, depth=1))
    chosen = load_run(tmp_path / "runs" / "run", checkpoint=4).checkpoint
    assert str(chosen) == "checkpoint 4: step 4"

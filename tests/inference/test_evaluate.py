"""Evaluation: metrics follow their definitions, and are the same on every world size and from every source."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from fastvit_train.cli.main import main
from fastvit_train.config.schema import DataConfig, TrainConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.inference import evaluate
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.inference.evaluation_output import metrics
from fastvit_train.inference.export import export_run
from fastvit_train.inference.predict import predict_images
from fastvit_train.inference.trained_model import load_run
from fastvit_train.inference.tta import TTA, AveragedViews
from fastvit_train.models.evaluator import Evaluation, _ahead
from fastvit_train.training.loop import fit, train
from fastvit_train.utils.errors import UserError
from tests.support import launch, one_line_error, write_folder
from tests.support.pictures import record_pictures
from tests.support.tars import write_tar


def evaluation_of(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """The evaluation of a model with these logits, (N, classes)."""
    confidence, predicted = logits.softmax(1).max(1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Evaluation(labels, predicted, confidence, losses, _ahead(logits, labels), logits.shape[1])


def test_the_metrics_follow_their_definitions(seed: int) -> None:
    """Each metric is recomputed image by image, in plain Python."""
    labels, logits = torch.randint(0, 6, (500,)), torch.randn(500, 7, dtype=torch.float64) * 2
    logits[range(500), labels] += 1.5  # class 6 has no image
    result = evaluation_of(logits, labels)
    probabilities = logits.softmax(1).tolist()
    pairs = Counter(zip(labels.tolist(), (row.index(max(row)) for row in probabilities), strict=True))
    assert result.accuracy == pytest.approx(sum(n for (true, predicted), n in pairs.items() if true == predicted) / 500)
    fifth = [sorted(row)[-5] for row in probabilities]
    top5 = sum(row[true] >= limit for row, true, limit in zip(probabilities, labels.tolist(), fifth, strict=True))
    assert result.top5_accuracy == pytest.approx(top5 / 500)
    for true in range(7):
        for predicted in range(7):
            assert result.confusion()[true, predicted] == pairs[true, predicted]
    predicted_as_2 = sum(n for (_, predicted), n in pairs.items() if predicted == 2)
    assert result.precision()[2].item() == pytest.approx(pairs[2, 2] / predicted_as_2)
    assert result.recall()[2].item() == pytest.approx(pairs[2, 2] / labels.tolist().count(2))
    assert result.recall()[6].isnan()
    recalls = [pairs[true, true] / labels.tolist().count(true) for true in range(6)]
    assert result.balanced_accuracy == pytest.approx(sum(recalls) / 6)
    precisions = [pairs[c, c] / max(1, sum(n for (_, said), n in pairs.items() if said == c)) for c in range(6)]
    f1 = [2 * p * r / (p + r) if p + r else 0 for p, r in zip(precisions, recalls, strict=True)]
    assert result.macro_f1 == pytest.approx(sum(f1) / 6)
    error = 0.0
    for number in range(15):
        inside = [
            (max(row), row.index(max(row)) == true)
            for row, true in zip(probabilities, labels.tolist(), strict=True)
            if number / 15 < max(row) <= (number + 1) / 15
        ]
        if inside:
            gap = sum(right for _, right in inside) / len(inside) - sum(sure for sure, _ in inside) / len(inside)
            error += len(inside) / 500 * abs(gap)
    assert error > 0.02 and result.calibration_error() == pytest.approx(error)


def test_standard_errors_are_the_spread_over_many_draws(seed: int) -> None:
    """Many sets of images are drawn, with 20 to 200 of a class; their accuracies spread as one set's error says."""
    labels = torch.arange(3).repeat_interleave(torch.tensor([200, 60, 20]))
    chances = torch.tensor([0.9, 0.6, 0.3])[labels]
    results = [evaluation_of(torch.eye(3)[(labels + (torch.rand(280) > chances)) % 3], labels) for _ in range(1000)]
    for name in ("accuracy", "balanced_accuracy"):
        errors = torch.tensor([getattr(result, f"{name}_error") for result in results])
        spread = torch.tensor([getattr(result, name) for result in results]).std()
        # Within a class all images have the same chance; the accuracy's error assumes that of all images.
        tolerance = 0.1 if name == "balanced_accuracy" else 0.3
        assert errors.mean().item() == pytest.approx(spread.item(), rel=tolerance), name


def test_ties_and_nan_do_not_count_as_correct() -> None:
    """With equal logits only the first five classes are among the top five; with NaN none is."""
    labels = torch.arange(10)
    assert evaluation_of(torch.zeros(10, 10), labels).top5_accuracy == 0.5
    assert evaluation_of(torch.full((10, 10), torch.nan), labels).top5_accuracy == 0


def test_outputs_of_nan_are_one_line(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "head.weight": torch.full_like(weights["head.weight"], torch.nan)}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match="the outputs of .* are NaN or inf for 359 of 359 images"):
        evaluate_run(folder)
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="the outputs of .* are NaN or inf: its weights are damaged"):
        predict_images(
            str(folder), [str(tmp_path / "x.png")], top=1, batch_size=1, as_json=True, show=False, output=None
        )
    with pytest.raises(UserError, match="the outputs of .* are NaN or inf: its weights are damaged"):
        export_run(str(folder), "safetensors", None)
    assert not (folder / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(("dataset", "on", "images"), [(None, "holdout", 143), ("digits", "test", 359)])
def test_a_run_with_a_holdout_is_evaluated_on_the_test_set_on_request(
    trained: Path, tmp_path: Path, dataset: str | None, on: str, images: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("holdout: 0.0", "holdout: 0.1"))
    evaluated = evaluate_run(folder, dataset=dataset)
    assert (evaluated.dataset.evaluated_on, evaluated.evaluation.samples) == (on, images)


def write_wide_images(root: Path) -> Path:
    for split, label in product(("train", "test"), (0, 1)):
        (root / split / str(label)).mkdir(parents=True)
        for number in range(6):
            picture = Image.effect_noise((48, 16), 90 + 50 * label).convert("RGB")
            picture.save(root / split / str(label) / f"{number}.png")
    return root


@pytest.mark.slow
def test_other_images_are_rendered_as_in_training(tmp_path: Path) -> None:
    """Wide images in a folder and in shards are the same to a run that pads them."""
    images = write_wide_images(tmp_path / "photos")
    tests = sorted((images / "test").rglob("*.png"))
    for split in ("train", "test"):
        files = [
            (f"{number:02}.{kind}", content)
            for number, path in enumerate(sorted((images / split).rglob("*.png")))
            for kind, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode()))
        ]
        write_tar(tmp_path / "shards" / f"{split}-0.tar", files)
    settings = {"fit": "pad", "background": "black", "epochs": 1, "depth": 1, "attention": "fused", "batch_size": 4}
    train(dataset="folder", data_dir=str(images), runs_dir=str(tmp_path), exp_name="run", **settings)
    own = evaluate.evaluate(tmp_path / "run")
    other = evaluate.evaluate(tmp_path / "run", dataset="shards", data_dir=str(tmp_path / "shards"))
    assert own.samples == len(tests) and torch.equal(own.confidence, other.confidence)


@pytest.mark.slow
def test_an_exported_model_is_evaluated_on_images_that_are_resized_as_in_training(tmp_path: Path) -> None:
    images = str(write_wide_images(tmp_path / "photos"))
    settings = {"fit": "stretch", "epochs": 1, "depth": 1, "attention": "fused", "batch_size": 4}
    train(dataset="folder", data_dir=images, runs_dir=str(tmp_path), exp_name="run", **settings)
    exported = export_run(str(tmp_path / "run"), "timm", None)
    own = evaluate.evaluate(tmp_path / "run")
    theirs = evaluate.evaluate(f"local-dir:{exported}", dataset="folder", data_dir=images)
    torch.testing.assert_close(theirs.confidence, own.confidence, rtol=1e-5, atol=1e-6)
    assert load_run(exported).rendering == load_run(tmp_path / "run").rendering


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the threads are those of a CPU")
def test_the_threads_that_it_ran_on_are_recorded(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("fastvit_train.utils.machine.usable_cores", lambda: 3)
    evaluated = evaluate_run(trained)
    assert evaluated.device.endswith(", 3 threads") and metrics(evaluated)["device"] == evaluated.device
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_a_model_of_two_classes_has_no_top_5_accuracy(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_folder(tmp_path / "shapes"))
    fit(small_config(dataset="folder", data_dir=data, crop="none", epochs=1, batch_size=12))
    capsys.readouterr()
    main(["eval", str(tmp_path / "runs" / "run")])
    output = capsys.readouterr().out
    assert "(test, 24 images) accuracy " in output and "top-5" not in output


@pytest.mark.slow
def test_a_run_and_its_timm_folder_are_evaluated_alike(
    trained: Path, timms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = record_pictures(monkeypatch)
    summary = json.loads((trained / "summary.json").read_text())
    main(["eval", str(trained), "--output", str(tmp_path / "a"), "--attention", "naive"])
    line = capsys.readouterr().out
    figures = rf"{summary['test_accuracy']:.2%} ± \d\.\d\d, balanced \d\d\.\d\d% ± \d\.\d\d, top-5 "
    assert re.search(rf"digits \(test, 359 images\) accuracy {figures}", line)
    main(["eval", f"local-dir:{timms}", "--dataset", "digits", "--output", str(tmp_path / "b"), "--batch-size", "50"])
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert first["accuracy"] == second["accuracy"] == summary["test_accuracy"] > 0.6
    assert (first["steps"], second["steps"]) == (summary["steps"], None)
    assert first["loss"] == pytest.approx(summary["test_loss"], abs=1e-5)
    assert first["confusion"] == second["confusion"]
    assert sum(map(sum, first["confusion"])) == first["images"] == 359
    assert [row["images"] for row in first["classes"]] == [sum(row) for row in first["confusion"]]
    picture = pictures[tmp_path / "b" / "confusion.png"]
    counts = {f"{count:,}" for row in first["confusion"] for count in row}
    assert len(picture.panels) == 1 and {"predicted", "true", *map(str, range(10)), *counts} <= set(picture.texts)


def test_the_model_is_prepared_before_it_is_warmed_up(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate moves it to its device and wraps it."""
    warmed_up: list[torch.nn.Module] = []
    monkeypatch.setattr(evaluate, "COMPILING", ("fused",))
    monkeypatch.setattr(evaluate, "warm_up", lambda model, *_: warmed_up.append(model))
    monkeypatch.setattr(
        Accelerator, "prepare_model", lambda self, model, **_: torch.nn.Sequential(model).to(self.device)
    )
    evaluate_run(trained)
    assert [type(model) for model in warmed_up] == [torch.nn.Sequential]


@pytest.mark.nullgpu
@pytest.mark.parametrize("attention", ["triton", "compiled"])
def test_every_attention_is_evaluated_on_a_gpu(trained: Path, attention: str) -> None:
    evaluated = evaluate_run(trained, attention=attention)
    assert evaluated.evaluation.samples == 359
    assert next(evaluated.run.model.parameters()).is_cuda


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_result_for_every_sample(trained: Path, tmp_path: Path, processes: int) -> None:
    """359 images on 3 processes leave uneven shares."""
    args = ["eval", trained, "--batch-size", 50, "--output", tmp_path / "eval"]
    done = launch(*args, processes=processes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"world size {processes}" in done.stdout and done.stdout.count("accuracy") == 1
    values = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    alone = evaluate_run(trained).evaluation
    assert values["images"] == 359 and values["confusion"] == alone.confusion().tolist()
    assert values["loss"] == pytest.approx(alone.loss, abs=1e-6)
    assert values["expected_calibration_error"] == pytest.approx(alone.calibration_error(), abs=1e-5)


def test_letters_with_marks_are_the_same_however_they_are_written(trained: Path) -> None:
    model = replace(load_run(trained, device="cpu"), class_names=("caf\u00e9", "tea"))
    digits = load_dataset(DataConfig(), model.input_size)
    evaluate._check_classes(
        model, replace(digits, classes=("cafe\u0301", "tea"))
    )  # as in tar files that were made on macOS
    with pytest.raises(UserError, match="was trained on the classes"):
        evaluate._check_classes(model, replace(digits, classes=("cafe", "tea")))


def test_other_classes_are_refused(trained: Path, tmp_path: Path) -> None:
    data = str(write_folder(tmp_path / "shapes"))
    with pytest.raises(UserError, match=r"was trained on the classes \['0', .*, but shapes has \['circle', 'square'\]"):
        evaluate_run(trained, dataset="folder", data_dir=data)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("nowhere", "nowhere is not a run; allowed: the folder of a finished run, local-dir:FOLDER"),
        ("mc_vit_4_4_32", "mc_vit_4_4_32 cannot be loaded: .*pretrained weights"),
        ("hf-hub:", "hf-hub: cannot be loaded"),
        (".", "is neither a run nor a model folder from timm: config.json"),
    ],
)
def test_a_source_that_is_not_a_run_is_one_line(
    run: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_run(run)


def test_a_model_without_data_says_what_to_give(timms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", str(timms)])
    assert "does not record a data set; give --dataset and --data-dir" in one_line_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    "damage",
    [
        {"architecture": "os.system"}, {"architecture": "../../etc"}, {"architecture": 5},
        {"model_args": {"embed_dim": 10**9}}, {"model_args": {"depth": "x"}}, {"model_args": [1]},
        {"num_classes": "many"}, {"pretrained_cfg": 5},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_timm_folders_are_one_line(timms: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((timms / "model.safetensors").read_bytes())
    described = json.loads((timms / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **damage}))
    with pytest.raises(UserError, match="is neither a run nor|cannot be loaded"):
        load_run(folder)


def test_the_ranking_of_two_classes_is_judged_over_all_thresholds(seed: int) -> None:
    """Against the definitions: pairs of images, and precision at each recall; probabilities with many ties."""
    labels = (torch.rand(300) < 0.3).long()
    probability = ((labels * 0.3 + torch.rand(300) * 0.7) * 20).round() / 20
    probability = probability.clamp(0.05, 0.95)
    result = evaluation_of(torch.stack((1 - probability, probability), 1).log(), labels)
    positive, negative = probability[labels == 1].double(), probability[labels == 0].double()
    pairs = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    assert result.roc_auc == pytest.approx(pairs.mean().item(), abs=1e-6)
    expected, before = 0.0, 0.0
    for threshold in sorted(set(probability.tolist()), reverse=True):
        accepted = probability >= threshold
        recall = (labels[accepted] == 1).sum().item() / len(positive)
        expected += (recall - before) * (labels[accepted] == 1).double().mean().item()
        before = recall
    assert result.average_precision == pytest.approx(expected, abs=1e-6)
    assert evaluation_of(torch.randn(20, 3), torch.arange(20) % 3).roc_auc is None
    assert evaluation_of(torch.randn(20, 2), torch.zeros(20, dtype=torch.int64)).average_precision is None


@pytest.mark.slow
def test_two_classes_have_a_picture_of_their_curves(
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = record_pictures(monkeypatch)
    data = str(write_folder(tmp_path / "shapes"))
    fit(small_config(dataset="folder", data_dir=data, crop="none", epochs=1, batch_size=12))
    main(["eval", str(tmp_path / "runs" / "run")])
    values = json.loads((tmp_path / "runs" / "run" / "eval" / "evaluation.json").read_text())
    assert f"area under the ROC curve {values['roc_auc']:.4f}" in capsys.readouterr().out
    picture = pictures[tmp_path / "runs" / "run" / "eval" / "roc.png"]
    assert len(picture.panels) == 2
    assert {"false positive rate", "recall", f"ROC, square: {values['roc_auc']:.4f}"} <= set(picture.texts)


class Corner(torch.nn.Module):
    """Logits that show which view of an image a model sees."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2, 1, 1]


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_the_views_are_averaged_as_probabilities(seed: int, tta: TTA) -> None:
    images = torch.randn(5, 3, 6, 6)
    got = AveragedViews(Corner(), tta)(images)
    views = []
    for step in (0, -1, 1) if tta == "shift" else (0,):
        row = images[:, :2, 1 + step]
        views += [row[:, :, 1 + step], row[:, :, 4 + step]]  # a mirror image has column 4 in the place of column 1
    torch.testing.assert_close(got, torch.stack([view.softmax(1) for view in views]).mean(0).log())


@pytest.mark.slow
def test_tta_is_named_and_goes_into_a_folder_of_its_own(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    main(["eval", str(tmp_path / "run"), "--tta", "flip"])
    output = capsys.readouterr().out
    assert "test-time augmentation flip: not comparable" in output
    values = json.loads((tmp_path / "run" / "eval-tta-flip" / "evaluation.json").read_text())
    assert values["tta"] == "flip" and not (tmp_path / "run" / "eval").exists()
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), "--tta", "rotate"])
    assert "none, flip, shift" in capsys.readouterr().err.replace("'", "")

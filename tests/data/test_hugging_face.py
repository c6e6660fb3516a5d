"""--dataset hf:NAME: columns and splits are recognised, images are decoded as files are, mistakes are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.cli.main import main
from fastvit_train.config.schema import DataConfig
from fastvit_train.data import images as image_batches
from fastvit_train.data.datasets import DatasetSpec, count_classes, load_dataset
from fastvit_train.data.decode import decode
from fastvit_train.data.rendering import Rendering
from fastvit_train.data.sources import hub, hugging_face
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.inference.model_card import HUB_NAME
from fastvit_train.training.loop import train
from fastvit_train.utils.errors import UserError
from tests.support import launch, one_line_error, rgb
from tests.support.parquet import IMAGE, NAMED, NUMBER, TEXT, alternating, images, png, write, write_split


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")  # here, since importing it takes a second of each test process
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def load(root: Path, size: int = 16, **settings: Any) -> DatasetSpec:
    return load_dataset(DataConfig(dataset=f"hf:{root}", **settings), rgb(size), examine_streamed=True)


@pytest.mark.parametrize(
    ("image", "label", "test"), [("image", "label", "test"), ("img", "fine_label", "validation"), ("x", "y", "valid")]
)
def test_columns_and_splits_are_recognised(tmp_path: Path, image: str, label: str, test: str) -> None:
    dataset = load(write(tmp_path / "animals", image, label, test))
    assert (dataset.name, dataset.classes, dataset.evaluated_on) == ("animals", ("cat", "dog"), test)
    assert dataset.train.labels.tolist() == alternating(40) and dataset.test.labels.tolist() == alternating(10)
    assert dataset.notes == (f"images from column {image}, labels from column {label}, training on split train",)
    assert count_classes(DataConfig(dataset=f"hf:{tmp_path / 'animals'}")) == 2


@pytest.mark.parametrize("stream", ["never", "always"])
def test_images_are_decoded_as_files_are(tmp_path: Path, stream: str) -> None:
    dataset = load(write(tmp_path / "animals"), stream=stream, fit="pad")
    file = tmp_path / "7.png"
    file.write_bytes(png(7))
    expected = decode(file, rgb(16), Rendering(fit="pad"))
    assert torch.equal(dataset.train.pixels(torch.tensor([7]), rgb(16))[0], expected)


def test_decoded_images_are_cached_until_the_data_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "animals")
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(image_batches, "try_decode_all", None)
        assert torch.equal(load(root).train.images, first.train.images)  # type: ignore[arg-type]
    write_split(root, "train", {"image": images(40, 50), "label": (NAMED, alternating(40))})
    hugging_face._load.cache_clear()  # as in another process
    assert not torch.equal(load(root).train.images, first.train.images)  # type: ignore[arg-type]


@pytest.mark.parametrize("unlabeled", [-1, None])
def test_a_test_split_without_labels_is_passed_over(tmp_path: Path, unlabeled: int | None) -> None:
    root = write(tmp_path / "animals", test="validation")
    write_split(root, "test", {"image": images(10, 200), "label": (NAMED, [0, *[unlabeled] * 9])})
    assert load(root).evaluated_on == "validation"


@pytest.mark.parametrize(("feature", "values"), [(TEXT, ["sparrow", "finch"]), (NUMBER, [7, 3])])
def test_labels_without_a_list_of_names(tmp_path: Path, feature: dict[str, Any], values: list[Any]) -> None:
    write_split(tmp_path / "birds", "train", {"image": images(4), "label": (feature, values * 2)})
    write_split(tmp_path / "birds", "test", {"image": images(1), "label": (feature, values[:1])})
    dataset = load(tmp_path / "birds")
    assert dataset.classes == tuple(map(str, sorted(values)))
    assert dataset.train.labels.tolist() == [1, 0, 1, 0] and dataset.test.labels.tolist() == [1]


def test_holdout_needs_no_test_split(tmp_path: Path) -> None:
    write_split(tmp_path / "animals", "train", {"image": images(40), "label": (NAMED, alternating(40))})
    dataset = load(tmp_path / "animals", holdout=0.2)
    assert (len(dataset.train.labels), len(dataset.test.labels), dataset.evaluated_on) == (32, 8, "holdout")


@pytest.mark.slow
def test_a_run_is_trained_and_evaluated_on_it(tmp_path: Path) -> None:
    root = write(tmp_path / "animals")
    settings = {
        "epochs": 2,
        "batch_size": 8,
        "image_size": 16,
        "attention": "fused",
        "runs_dir": str(tmp_path / "runs"),
    }
    summary = train(dataset=f"hf:{root}", **settings)
    assert summary["dataset"] == "animals" and summary["evaluated_on"] == "test"
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == "animals-mc_vit_4_4_32-seed0"
    assert evaluate_run(run).evaluation.accuracy == summary["test_accuracy"]


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"dataset": f"hf:{write(tmp_path / 'animals')}", "runs_dir": str(tmp_path / "runs"), "epochs": 3}
    settings |= {"batch_size": 8, "image_size": 16, "depth": 1, "attention": "fused", "save_every": 2}
    train(exp_name="whole", **settings)
    train(exp_name="parts", stream="always", stop_after=1, **settings)
    train(exp_name="parts", stream="always", resume="must", **settings)
    whole, parts = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_that_stream_it_agree_with_one(tmp_path: Path) -> None:
    flags = ("--dataset", f"hf:{write(tmp_path / 'animals')}", "--stream", "always", "--epochs", 2, "--batch-size", 8)
    for processes in (1, 2):
        done = launch(
            *flags, "--image-size", 16, "--runs-dir", tmp_path, "--exp-name", processes,
            processes=processes, HF_DATASETS_CACHE=str(tmp_path / "hf-cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "animals: 40 training images, 10 evaluation images (test), 2 classes" in done.stdout + done.stderr
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "12")
    assert one["test_loss"] == pytest.approx(two["test_loss"], abs=1e-5)


BROKEN: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "no images": (
        {"train": {"text": (TEXT, ["a"]), "label": (NAMED, [0])}},
        r"has no column of images; its columns are text \(Value\), label \(ClassLabel\)",
    ),
    "no labels": (
        {"train": {"image": images(1), "size": (NUMBER, [0])}},
        "has no column of labels; its columns are image",
    ),
    "a missing label": (
        {
            "train": {"image": images(3), "label": (TEXT, ["a", None, "b"])},
            "test": {"image": images(1), "label": (TEXT, ["a"])},
        },
        "1 training image without a label in label",
    ),
    "no test split": ({"train": {"image": images(2), "label": (NAMED, [0, 1])}}, "its splits are train.*--holdout"),
    "secret labels": (
        {
            "train": {"image": images(2), "label": (NAMED, [0, 1])},
            "test": {"image": images(2), "label": (NAMED, [-1, -1])},
        },
        "none of test has a label for every image.*--holdout",
    ),
    "a class without training images": (
        {
            "train": {"image": images(2), "label": (TEXT, ["a", "b"])},
            "test": {"image": images(1), "label": (TEXT, ["c"])},
        },
        "no training image has the label 'c'",
    ),
    "a damaged image": (
        {
            "train": {
                "image": (IMAGE, [{"bytes": png(0), "path": "0.png"}, {"bytes": b"nothing", "path": "1.png"}]),
                "label": (NAMED, [0, 1]),
            },
            "test": {"image": images(1), "label": (NAMED, [0])},
        },
        "row 1 of split train can't be decoded",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_missing_or_damaged_is_named(tmp_path: Path, case: str) -> None:
    splits, message = BROKEN[case]
    for split, columns in splits.items():
        write_split(tmp_path / "broken", split, columns)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "broken")


@pytest.mark.slow
def test_names_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_is_reachable", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["--dataset", "hf:no/such", "--runs-dir", str(tmp_path / "runs")])
    error = one_line_error(capsys.readouterr().err)
    assert stop.value.code == 2 and error.startswith("--dataset hf:no/such cannot be loaded: ")
    assert error.endswith("; check the network (HF_ENDPOINT names a mirror), or give hf:FOLDER with a copy")
    mistaken = launch("--dataset", "cifar", "--runs-dir", tmp_path / "runs", before=["--cpu"])
    error = one_line_error(mistaken.stderr)
    assert error.startswith("--dataset 'cifar' is not allowed (did you mean cifar10 or cifar100?); allowed: digits, ")
    assert error.endswith(", or hf:USER/NAME")
    assert not (tmp_path / "runs").exists()


def test_a_model_card_names_what_is_on_the_hub_and_no_folder() -> None:
    assert all(HUB_NAME.fullmatch(name) for name in ("hf:uoft-cs/cifar10", "hf:uoft-cs/cifar10:plain_text"))
    assert not any(HUB_NAME.fullmatch(name) for name in ("hf:/photos/animals", "hf:animals", "digits"))

"""Folders of images in every layout: with and without splits, with accents in class names, with a holdout."""

import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvit_train.config.schema import DataConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec, count_classes, load_dataset
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.support import rgb, write_folder

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def load(root: Path, **settings: object) -> DatasetSpec:
    config = DataConfig(dataset="folder", data_dir=str(root), **settings)
    dataset = load_dataset(config, rgb(32))
    assert count_classes(config) == len(dataset.classes)
    return dataset


def write_flat(root: Path, per_class: int = 10) -> Path:
    """Write photos/CLASS/IMAGE, without train/ and test/."""
    split = write_folder(root, per_class) / "train"
    for folder in list(split.iterdir()):
        folder.rename(root / folder.name)
    shutil.rmtree(split)
    shutil.rmtree(root / "test")
    return root


def pixels_of(split: object) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}  # type: ignore[attr-defined]


def test_composed_and_decomposed_names_are_the_same_class(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", per_class=2, classes=(NFD, "zebra"))
    (root / "test" / NFD).rename(root / "test" / NFC)
    dataset = load(root)
    assert dataset.classes == (NFC, "zebra") and len(dataset.test.labels) == 4
    (root / "train" / NFC).mkdir()
    Image.new("RGB", (32, 32)).save(root / "train" / NFC / "one more.png")
    assert load(root).train.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_model_with_decomposed_names_is_evaluated_on_composed_ones(
    tmp_path: Path, small_config: Callable[..., TrainConfig]
) -> None:
    root = write_folder(tmp_path / "photos", per_class=2, classes=(NFC, "zebra"))
    fit(small_config(dataset="folder", data_dir=str(root), epochs=1, batch_size=4))
    file = tmp_path / "runs" / "run" / "config.json"
    file.write_text(file.read_text().replace("caf\\u00e9", "cafe\\u0301").replace(NFC, NFD))
    assert evaluate(tmp_path / "runs" / "run").samples == 4


def test_a_holdout_that_empties_a_class_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", per_class=3)
    for number in (1, 2):
        (root / "train" / "square" / f"{number}.png").unlink()
    message = r"--holdout 0.1 holds out all training images of 1 of 2 classes: square \(1\); lower it, or add images"
    with pytest.raises(UserError, match=message):
        load(root, holdout=0.1)
    with pytest.raises(UserError, match=r"of 2 of 2 classes: circle \(3\), square \(1\)"):
        load(root, holdout=0.9)


@pytest.mark.parametrize("test_split", ["none", "other classes"])
def test_a_holdout_needs_and_reads_no_test_split(tmp_path: Path, test_split: str) -> None:
    root = write_folder(tmp_path / "photos", per_class=10)
    whole = load(root, holdout=0.2)
    if test_split == "none":
        shutil.rmtree(root / "test")
    else:
        (root / "test" / "circle").rename(root / "test" / "ellipse")
    dataset = load(root, holdout=0.2)
    assert dataset.evaluated_on == "holdout" and len(dataset.train.labels) == 16
    assert torch.equal(dataset.train.images, whole.train.images)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", ["never", "always"])
def test_folders_of_classes_alone_are_split_by_class_and_seed(tmp_path: Path, stream: str) -> None:
    root = write_flat(tmp_path / "photos")
    one, again, other = (load(root, holdout=0.2, holdout_seed=seed, stream=stream) for seed in (1, 1, 2))
    assert one.classes == ("circle", "square") and one.evaluated_on == "holdout"
    assert one.train.labels.bincount().tolist() == [8, 8] and one.test.labels.bincount().tolist() == [2, 2]
    if stream == "always":
        names = [set(map(str, dataset.test.images.paths)) for dataset in (one, again, other)]  # type: ignore[union-attr]
        assert not names[0] & set(map(str, one.train.images.paths))  # type: ignore[union-attr]
    else:
        names = [pixels_of(dataset.test) for dataset in (one, again, other)]
        assert not names[0] & pixels_of(one.train)
    assert names[0] == names[1] != names[2]


def test_the_split_is_recorded_and_eval_uses_it(tmp_path: Path, small_config: Callable[..., TrainConfig]) -> None:
    root = write_flat(tmp_path / "photos")
    settings = {"dataset": "folder", "data_dir": str(root), "holdout": 0.2, "holdout_seed": 5, "seed": 3}
    summary = fit(small_config(**settings, epochs=1, batch_size=16))
    run = tmp_path / "runs" / "run"
    recorded = RunFolder(run).read_config()
    assert (recorded["holdout"], recorded["holdout_seed"]) == (0.2, 5)
    assert summary["evaluated_on"] == "holdout" and summary["evaluated_images"] == 4
    evaluation = evaluate(run)
    assert evaluation.samples == 4 and evaluation.loss == pytest.approx(summary["test_loss"], abs=1e-5)


def test_the_seed_of_the_run_does_not_move_the_holdout(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(holdout=0.1).data
    digits = load_dataset(config, rgb(32))
    assert torch.equal(load_dataset(replace(config), rgb(32)).test.labels, digits.test.labels)
    assert not torch.equal(load_dataset(replace(config, holdout_seed=1), rgb(32)).test.images, digits.test.images)  # type: ignore[arg-type]


def test_folders_of_classes_alone_need_a_holdout(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "photos", per_class=2)
    message = "has no train/ and no test/; expected .* or .*/photos/CLASS/IMAGE and a training with --holdout 0.2"
    with pytest.raises(UserError, match=message):
        load(root)


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "photos", per_class=4)
    (root / "circle").rename(root / "train")
    assert load(root, holdout=0.25).classes == ("square", "train")


def test_images_without_class_folders_are_not_one_class(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "photos", per_class=2)
    shutil.rmtree(root / "circle")
    (root / "square").rename(root / "train")
    with pytest.raises(UserError, match="train has no class folders; expected"):
        load(root, holdout=0.5)

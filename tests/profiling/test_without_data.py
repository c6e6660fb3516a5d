"""--dry-run and profile of a recipe whose data is not on the machine: synthetic images of its shape, and a line."""

from pathlib import Path

import pytest

from fastvit_train.cli.main import main
from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.data.sources import download, published
from tests.support import rgb
from tests.support.cifar import write_cifar10

SMALL = ("--embed-dim", "8", "--depth", "1", "--num-heads", "2", "--patch-size", "8", "--attention", "fused")


@pytest.fixture(autouse=True)
def _nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (download, published):
        monkeypatch.setattr(module, "download", lambda *_: pytest.fail("it downloads"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "images"), [("cifar10", 10, 50_000), ("cifar100", 100, 50_000), ("fashion-mnist", 10, 60_000)]
)
def test_an_imitation_has_the_shape_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, images: int
) -> None:
    data = load_dataset(DataConfig(dataset=name, data_dir="nowhere"), rgb(32), imitate=True)  # type: ignore[arg-type]
    assert len(data.classes) == classes and len(data.train.labels) == images and len(data.test.labels) == 10_000
    assert data.train.images.shape == (images, 3, 32, 32)  # type: ignore[union-attr]
    assert len(data.train.labels.unique()) == classes
    assert data.notes[0].startswith(f"{published.PUBLISHED[name].title} is not in nowhere: synthetic images")


def test_data_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar10(tmp_path / "data", monkeypatch)
    data = load_dataset(DataConfig(dataset="cifar10", data_dir=str(folder)), rgb(32), imitate=True)
    assert data.name == "CIFAR-10" and len(data.train.labels) < 50_000


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_without_its_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--recipe", "upstream-cifar100", "--batch-size", "500", "--eval-batch-size", "500", "--dry-run", *SMALL])
    text = capsys.readouterr().out
    assert "CIFAR-100 is not in data: synthetic images of its shape and number are used instead" in text
    assert "synthetic CIFAR-100: 50,000 training images, 10,000 evaluation images (test), 100 classes" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_profile_of_a_recipe_without_its_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvit_train.profiling.step_profile.measure_candidates", lambda *_: [])
    main(["profile", "--recipe", "upstream-cifar10", "--batch-size", "100", "--steps", "1", *SMALL])
    assert "CIFAR-10 is not in data: synthetic images" in capsys.readouterr().out

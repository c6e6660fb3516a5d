"""Runs without --exp-name: their names tell what they are, and never collide."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.run_names import default_name
from fastvit_train.training import setup
from fastvit_train.training.loop import fit
from fastvit_train.training.seeds import fit_seeds
from fastvit_train.utils.errors import UserError
from tests.support import launch, write_folder

SmallConfig = Callable[..., TrainConfig]
QUICKSTART = "digits-mc_vit_4_4_32-seed0"
FAST = {"epochs": 1, "depth": 1, "exp_name": None}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("quickstart", {}, QUICKSTART),
        ("fast-cifar10", {"seed": 3}, "fast-cifar10-mc_vit_4_4_32-seed3"),
        ("upstream-cifar10", {"model": "c_vit_4_4_32"}, "upstream-cifar10-c_vit_4_4_32-seed0"),
        ("upstream-cifar100", {"dataset": "cifar10"}, "upstream-cifar100-cifar10-mc_vit_4_4_32-seed0"),
        ("quickstart", {"dataset": "folder", "data_dir": "x/photos/"}, "photos-mc_vit_4_4_32-seed0"),
        ("fast-cifar10", {"dataset": "folder", "data_dir": "photos"}, "fast-cifar10-photos-mc_vit_4_4_32-seed0"),
        (
            "quickstart",
            {"dataset": "folder", "data_dir": "CIFAR-10 (JPEG copy)"},
            "CIFAR-10-JPEG-copy-mc_vit_4_4_32-seed0",
        ),
        ("quickstart", {"dataset": "folder", "data_dir": "/"}, "folder-mc_vit_4_4_32-seed0"),
        ("quickstart", {"dataset": "folder", "data_dir": "é" * 100}, f"{'é' * 33}-mc_vit_4_4_32-seed0"),
    ],
)
def test_a_default_name_tells_recipe_data_model_and_seed(name: str, settings: dict[str, object], expected: str) -> None:
    assert default_name(override(recipe(name), settings, "the test")) == expected


def names(runs: Path) -> set[str]:
    return {path.name for path in runs.iterdir()}


@pytest.mark.slow
def test_a_second_run_gets_a_number(small_config: SmallConfig, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for _ in range(2):
        fit(small_config(**FAST, track=["tensorboard"]))
    assert names(runs) == {QUICKSTART, f"{QUICKSTART}-2"}
    assert "exp_name: digits-mc_vit_4_4_32-seed0-2" in (runs / f"{QUICKSTART}-2" / "config.yaml").read_text()
    assert list((runs / f"{QUICKSTART}-2").glob("fastvit_train/events*")), "the tracker writes elsewhere"
    (runs / f"{QUICKSTART}-7").mkdir()
    (runs / f"{QUICKSTART}-7" / "mine.txt").touch()
    fit(small_config(**FAST))
    assert f"{QUICKSTART}-8" in names(runs)
    with pytest.raises(UserError, match="already holds a run"):
        fit(small_config(**FAST | {"exp_name": QUICKSTART}))


@pytest.mark.slow
def test_a_name_that_is_taken_during_the_setup_is_not_used_twice(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunLock(tmp_path / "runs" / QUICKSTART)
    load = setup.load_inputs

    def load_while_another_run_starts(*args: object) -> object:
        other.acquire()
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(setup, "load_inputs", load_while_another_run_starts)
    fit(small_config(**FAST))
    other.release()
    assert (tmp_path / "runs" / f"{QUICKSTART}-2" / "summary.json").is_file()
    assert not (tmp_path / "runs" / QUICKSTART / "config.yaml").exists()


def epochs_of(runs: Path) -> dict[str, int]:
    return {path.parent.name: json.loads(path.read_text())["epochs"] for path in runs.glob("*/summary.json")}


@pytest.mark.slow
def test_resume_finds_the_newest_run_with_these_settings(small_config: SmallConfig, tmp_path: Path) -> None:
    runs, two = tmp_path / "runs", FAST | {"epochs": 2}
    fit(small_config(**two, stop_after=1), resume="auto")  # there is none to resume
    fit(small_config(**FAST))
    fit(small_config(**two), resume="auto")
    assert epochs_of(runs) == {QUICKSTART: 2, f"{QUICKSTART}-2": 1}
    with pytest.raises(UserError, match=rf"{QUICKSTART}-2 was started with another configuration \(epochs: 1 -> 5\)"):
        fit(small_config(**FAST | {"epochs": 5}), resume="must")


@pytest.mark.slow
def test_resume_finds_a_run_with_the_default_name_of_earlier_versions(
    small_config: SmallConfig, tmp_path: Path
) -> None:
    folder = {"dataset": "folder", "data_dir": str(write_folder(tmp_path / "photos")), "crop": "none"}
    earlier = "folder-mc_vit_4_4_32-seed0"
    two = FAST | folder | {"epochs": 2}
    fit(small_config(**two | {"exp_name": earlier}, stop_after=1))
    fit(small_config(**two), resume="auto")
    assert epochs_of(tmp_path / "runs") == {earlier: 2}
    fit(small_config(**FAST, **folder), resume="auto")  # other settings: another run
    assert epochs_of(tmp_path / "runs") == {earlier: 2, "photos-mc_vit_4_4_32-seed0": 1}


@pytest.mark.slow
def test_overwrite_takes_the_newest_run(small_config: SmallConfig, tmp_path: Path) -> None:
    for _ in range(2):
        fit(small_config(**FAST))
    fit(small_config(**FAST | {"epochs": 2}), overwrite=True)
    assert epochs_of(tmp_path / "runs") == {QUICKSTART: 1, f"{QUICKSTART}-2": 2}


@pytest.mark.slow
def test_several_seeds_without_a_name_do_not_collide(small_config: SmallConfig, tmp_path: Path) -> None:
    group = "digits-mc_vit_4_4_32"
    assert fit_seeds(small_config(**FAST), 1)["runs"] == [f"{group}-seed0"]
    assert fit_seeds(small_config(**FAST), 1)["runs"] == [f"{group}-2-seed0"]
    assert fit_seeds(small_config(**FAST), 1, resume="auto")["runs"] == [f"{group}-2-seed0"]
    assert {f"{group}-1seeds.json", f"{group}-2-1seeds.json"} <= names(tmp_path / "runs")


@pytest.mark.parametrize("mistake", ["no folder", "empty class", "no image"])
def test_a_mistake_in_the_data_is_reported_before_a_name_is_taken(
    small_config: SmallConfig, tmp_path: Path, mistake: str
) -> None:
    photos = tmp_path / "photos"
    if mistake != "no folder":
        write_folder(photos)
        image = next(path for path in sorted(photos.rglob("*")) if path.is_file())
        Image.new("RGB", (8, 8)).save(image)
        (image.write_bytes if mistake == "no image" else lambda _: emptied(image.parent))(b"")
    with pytest.raises(UserError):
        fit(small_config(**FAST, dataset="folder", data_dir=str(photos), crop="none"))
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_data_is_reported_before_a_name_in_use(small_config: SmallConfig, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    settings = FAST | {"exp_name": "run", "dataset": "folder", "data_dir": str(photos), "crop": "none"}
    fit(small_config(**settings))
    with pytest.raises(UserError, match="already holds a run"):
        fit(small_config(**settings))
    emptied(next(path for path in sorted(photos.rglob("*")) if path.is_file()).parent)
    with pytest.raises(UserError, match="no images"):
        fit(small_config(**settings))


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.slow
def test_two_ranks_agree_on_a_numbered_name(tmp_path: Path) -> None:
    flags = ("--runs-dir", tmp_path, "--epochs", 1, "--embed-dim", 8, "--depth", 1, "--attention", "fused")
    for _ in range(2):
        done = launch(*flags, processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert names(tmp_path) == {QUICKSTART, f"{QUICKSTART}-2"}
    assert all((tmp_path / name / "model.safetensors").is_file() for name in names(tmp_path))

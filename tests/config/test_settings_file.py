"""Runs and files of settings of other versions: older ones lack settings, newer ones may have more."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastvit_train import __version__
from fastvit_train.cli.main import main
from fastvit_train.config import settings_file
from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.loop import fit
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError
from tests.support import one_line_error

Config = Callable[..., TrainConfig]
UPGRADE = rf"fastvit-train 99\.1 wrote it, and this is {__version__}: pip install --upgrade fastvit-train"


@pytest.fixture
def begun(small_config: Config) -> Path:
    """The folder of a run that stopped after its first epoch."""
    fit(small_config(stop_after=1, epochs=2))
    return Path(small_config().run.runs_dir) / "run"


def edit(path: Path, remove: tuple[str, ...] = (), **entries: object) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in remove}
    path.write_text(yaml.safe_dump({**kept, **entries}), encoding="utf-8")


@pytest.mark.slow
def test_a_missing_setting_has_its_default(begun: Path, small_config: Config) -> None:
    edit(begun / "config.yaml", remove=("crop_scale", "ema", "patch_init", "keep", "fastvit_train"))
    assert RunFolder(begun).read_config()["crop_scale"] == 0.8
    assert load_run(begun).config.data.crop_scale == 0.8
    with pytest.raises(UserError, match=r"another configuration \(crop_scale: 0.8 -> 0.5\)"):
        fit(small_config(epochs=2, crop_scale=0.5), resume="must")
    assert fit(small_config(epochs=2), resume="must")["epochs"] == 2


@pytest.mark.slow
def test_the_file_records_the_version(begun: Path, tmp_path: Path) -> None:
    assert begun.joinpath("config.yaml").read_text().startswith(f"fastvit_train: {__version__}\n")
    assert "fastvit_train" not in RunFolder(begun).read_config()
    main(["--config", str(begun / "config.yaml"), "--exp-name", "again", "--epochs", "1"])
    assert (begun.parent / "again" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("entry", [{"colour": "red"}, {"schedule": "spiral"}, {"epochs": "many"}])
def test_errors_of_a_newer_file_say_so(
    entry: dict[str, object], begun: Path, small_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(begun / "config.yaml", fastvit_train="99.1")
    load_run(begun)  # nothing in it is new
    edit(begun / "config.yaml", **entry)
    with pytest.raises(UserError, match=UPGRADE):
        load_run(begun)
    with pytest.raises(UserError, match=UPGRADE):
        fit(small_config(epochs=2), resume="must")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--config", str(begun / "config.yaml")])
    assert "pip install --upgrade fastvit-train" in one_line_error(capsys.readouterr().err)
    edit(begun / "config.yaml", fastvit_train=__version__)
    with pytest.raises(UserError) as caught:
        load_run(begun)
    assert "upgrade" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "is_newer"),
    [("99", True), ("0.2.0", False), ("0.1.9", False), ("1.0.dev1", True), (99, True), (None, False), ("x", False)],
)
def test_which_versions_are_newer(version: object, is_newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_file, "__version__", "0.2.0")
    assert bool(settings_file.upgrade_hint(version)) == is_newer


def change_checkpoints(run: Path, change: Callable[[dict[str, object]], object]) -> None:
    for path in (run / "checkpoints").glob("step_*/progress.json"):
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))
        atomic_io.write_checksums(path.parent)


@pytest.mark.slow
def test_an_older_checkpoint_is_resumed(begun: Path, small_config: Config) -> None:
    """It lacks what only a newer version records: of the state, and of the data."""
    change_checkpoints(
        begun, lambda saved: (saved.pop("version"), saved["progress"].pop("busy_seconds"), saved["data"].pop("labels"))
    )
    assert fit(small_config(epochs=2), resume="must")["epochs"] == 2


@pytest.mark.slow
def test_the_error_of_a_newer_checkpoint_says_so(begun: Path, small_config: Config) -> None:
    change_checkpoints(begun, lambda saved: (saved.update(version="99.1"), saved["progress"].update(mood="good")))
    with pytest.raises(UserError, match=f"can't be read .*mood.*; {UPGRADE}"):
        fit(small_config(epochs=2), resume="must")

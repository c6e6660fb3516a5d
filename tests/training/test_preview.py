"""--preview draws the first step's images, and trains nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvit_train.cli.main import main
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.loader import Preprocess
from fastvit_train.training.display.preview import preview
from tests.support import one_line_error, rgb
from tests.support.pictures import record_pictures

SmallConfig = Callable[..., TrainConfig]


@pytest.mark.slow
def test_the_sheet_shows_the_images_of_the_first_step_and_their_shares(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = record_pictures(monkeypatch)
    output = tmp_path / "sheet.png"
    preview(small_config(mixup=1.0, crop="shift"), output)
    titles = [title for title in pictures[output].texts if "%" in title]
    assert len(titles) > 10 and len(pictures[output].panels) == 36
    for title in titles:
        shares = [float(line.split()[1].rstrip("%")) for line in title.split("\n")]
        assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)
    assert not (tmp_path / "runs").exists()


def test_pixels_are_those_before_the_normalisation(seed: int) -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    preprocess = Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), rgb(8), torch.device("cpu"))
    assert torch.equal(preprocess.to_pixels(preprocess(images)), images)


def test_it_cannot_be_combined_with_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run", "--preview", str(tmp_path / "sheet.png")])
    assert "--dry-run and --preview can't be combined" in one_line_error(capsys.readouterr().err)


@pytest.mark.parametrize("flags", [["--repeat", "2"], ["--resume", "auto"], ["--overwrite"]], ids=str)
def test_flags_of_a_training_are_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--preview", str(tmp_path / "sheet.png")])
    assert stop.value.code == 2 and "--preview trains nothing; leave out" in one_line_error(capsys.readouterr().err)
    assert not (tmp_path / "sheet.png").exists()

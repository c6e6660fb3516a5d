"""The figures of `inspect`: attention maps, position embeddings and filters."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvit_train.cli.main import main
from fastvit_train.inference import inspect
from fastvit_train.inference.trained_model import load_run
from fastvit_train.models import attention_maps
from tests.support import one_line_error


def pictures(folder: Path) -> set[str]:
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size > (100, 100)
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(64**2)) > 20, f"{path} shows nothing"
    return {path.name for path in folder.iterdir()}


def test_a_run_is_inspected_on_its_test_set(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(trained), "--output", str(tmp_path / "looks")])
    names = pictures(tmp_path / "looks")
    assert {"attention-maps.png", "positions.png", "filters.png"} < names
    assert len(names) == 3 + inspect.TEST_IMAGES_BY_HEAD
    assert capsys.readouterr().out.count("written to ") == len(names)
    labels = load_run(trained).dataset().test.labels
    shown = sorted(int(name.removeprefix("test").partition("-")[0]) for name in names if name.startswith("test"))
    assert sorted(labels[shown].tolist()) == [0, 1, 2, 3], "the first image of each class"


def test_a_timm_folder_is_inspected_on_images(timms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(timms)])
    assert "does not record a data set; name the images to draw" in one_line_error(capsys.readouterr().err)
    for side, name in ((40, "a.png"), (64, "b.jpg")):
        Image.effect_noise((side, 50), 80).convert("RGB").save(tmp_path / name)
    main(["inspect", str(timms), str(tmp_path / "a.png"), str(tmp_path / "b.jpg"), "--output", str(tmp_path / "out")])
    assert pictures(tmp_path / "out") == {
        "attention-maps.png", "positions.png", "filters.png", "a-attention.png", "b-attention.png",
    }  # fmt: skip


def test_each_panel_shows_the_attention_map_of_its_image(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each panel of attention-maps.png shows the weights of its own image."""
    drawn: list[torch.Tensor] = []
    real = inspect._show_image
    monkeypatch.setattr(
        inspect, "_show_image", lambda axes, pixels, weights=None: (drawn.append(weights), real(axes, pixels, weights))
    )
    loaded = load_run(trained)
    pixels = loaded.dataset().test.images[:2]
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    inspect.inspect_run(str(trained), [str(tmp_path / "0.png"), str(tmp_path / "1.png")], tmp_path / "out")
    maps = attention_maps(loaded.model, loaded.preprocess(pixels))
    for number in range(2):
        _, pooled, rollout = drawn[3 * number : 3 * number + 3]
        torch.testing.assert_close(pooled, maps.pooled[number])
        torch.testing.assert_close(rollout, maps.rollout[number])


def test_unreadable_images_and_unwritable_folders_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, message in (
        ([str(trained), str(tmp_path / "no.png")], "no.png does not exist; check its spelling"),
        ([str(trained), "--output", "/dev/null/x"], "/dev/null/x cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *args])
        assert stop.value.code == 2 and message in one_line_error(capsys.readouterr().err)

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
from tests.support.pictures import Picture, record_pictures


@pytest.mark.slow
def test_a_run_is_inspected_on_its_test_set(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has 64 patches, 2 layers with 2 heads, and 24 filters; 10 test images are drawn by default."""
    pictures = {path.name: picture for path, picture in _inspect(monkeypatch, trained, tmp_path / "looks").items()}
    names = {path.name for path in (tmp_path / "looks").iterdir()}
    assert names == pictures.keys() and len(names) == 3 + inspect.TEST_IMAGES_BY_HEAD
    counts = {name: len(picture.panels) for name, picture in pictures.items()}
    assert (counts.pop("attention-maps.png"), counts.pop("positions.png"), counts.pop("filters.png")) == (30, 64, 24)
    assert list(counts.values()) == [2 * (1 + 2)] * inspect.TEST_IMAGES_BY_HEAD
    maps = pictures["attention-maps.png"].texts
    assert {"image", "rollout", "pooling weights", *map(str, range(10))} <= set(maps) and len(maps) == 23
    heads = pictures[next(iter(counts))].texts
    title = "0: attention by layer and head; each map is scaled to its own maximum"
    assert {title, "head 1", "head 2", "layer 1", "layer 2"} <= set(heads)
    title = "cosine similarity of the position embeddings, from -1 (blue) to 1 (red)"
    assert list(pictures["positions.png"].texts) == [title]
    assert list(pictures["filters.png"].texts) == ["the first layer's filters, by descending norm"]
    assert capsys.readouterr().out.count("written to ") == len(names)
    labels = load_run(trained).dataset().test.labels
    shown = sorted(int(name.removeprefix("test").partition("-")[0]) for name in names if name.startswith("test"))
    assert sorted(labels[shown].tolist()) == [0, 1, 2, 3], "the first image of each class"


def _inspect(monkeypatch: pytest.MonkeyPatch, *args: object) -> dict[Path, Picture]:
    """Run `inspect RUN [IMAGES] FOLDER`; returns the pictures that it wrote into FOLDER."""
    pictures = record_pictures(monkeypatch)
    *args, output = map(str, args)
    main(["inspect", *args, "--output", output])
    return pictures


@pytest.mark.slow
def test_a_timm_folder_is_inspected_on_images(
    timms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(timms)])
    assert "does not record a data set; name the images to draw" in one_line_error(capsys.readouterr().err)
    for side, name in ((40, "a.png"), (64, "b.jpg")):
        Image.effect_noise((side, 50), 80).convert("RGB").save(tmp_path / name)
    pictures = _inspect(monkeypatch, timms, tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix(): len(one.panels) for path, one in pictures.items()} == {
        "attention-maps.png": 6, "positions.png": 64, "filters.png": 24, "a-attention.png": 6, "b-attention.png": 6,
    }  # fmt: skip


@pytest.mark.slow
def test_names_that_differ_only_in_case_get_numbers(timms: Path, tmp_path: Path) -> None:
    """A disk that ignores the case of names would keep only one of the pictures."""
    images = [tmp_path / "photos" / "cat.png", tmp_path / "Cat.png"]
    images[0].parent.mkdir()
    for path in images:
        Image.effect_noise((40, 50), 80).convert("RGB").save(path)
    main(["inspect", str(timms), *map(str, images), "--output", str(tmp_path / "out")])
    assert {"1-cat-attention.png", "2-Cat-attention.png"} < {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
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

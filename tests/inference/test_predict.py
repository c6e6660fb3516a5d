"""Predictions for images from files, folders, patterns and standard input, and for images that are broken."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_train.cli.main import main
from fastvit_train.inference import predict
from fastvit_train.inference.trained_model import load_run
from tests.support import one_line_error
from tests.support.pictures import record_pictures

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def digits(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first 30 test images, each named NUMBER-LABEL.png."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    folder.mkdir()
    test = load_run(trained).dataset().test
    assert not isinstance(test.images, list)
    for number, (pixels, label) in enumerate(zip(test.images[:30], test.labels[:30].tolist(), strict=True)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number:02}-{label}.png")
    return folder


def predicted(capsys: Capture, *args: object, status: int = 0) -> list[dict]:
    """The lines of JSON that the command prints; its exit status must be `status`."""
    if status:
        with pytest.raises(SystemExit) as stop:
            main(["predict", *map(str, args), "--json"])
        assert stop.value.code == status
    else:
        main(["predict", *map(str, args), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("batch_size", [7, 256])
def test_predictions_agree_with_load_run_and_the_timm_folder(
    trained: Path, timms: Path, digits: Path, capsys: Capture, batch_size: int
) -> None:
    results = predicted(capsys, trained, digits, "--top", 10, "--batch-size", batch_size)
    assert [Path(one["image"]).name for one in results] == sorted(path.name for path in digits.iterdir())
    correct = sum(one["top"][0]["class"] == one["image"][-5] for one in results)
    assert correct >= 15, "most digits are classified correctly"
    assert all(sum(entry["probability"] for entry in one["top"]) == pytest.approx(1, abs=1e-5) for one in results)
    logits = load_run(trained).predict(load_run(trained).dataset().test.images[:30])  # type: ignore[index]
    assert [one["top"][0]["probability"] for one in results] == pytest.approx(logits.max(1).values.tolist(), abs=1e-5)
    assert predicted(capsys, timms, digits, "--top", 10) == [
        {"image": one["image"], "top": [pytest.approx(entry, abs=1e-5) for entry in one["top"]]} for one in results
    ]


def test_patterns_and_a_broken_image(trained: Path, digits: Path, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(next(digits.iterdir()).read_bytes()[:60])
    pattern = digits / "0?-*.png"
    results = predicted(capsys, trained, broken, pattern, tmp_path / "nowhere.png", status=1)
    assert len(results) == 12 and all("top" in one for one in results[1:-1])
    assert "can't be decoded" in results[0]["error"] and "nowhere.png" in results[-1]["error"]


def test_the_table_says_how_images_are_resized(
    trained: Path, digits: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 200), "white").save("[red]large.png")
    main(["predict", str(trained), "[red]large.png", "--show", "--output", "shown"])
    text = capsys.readouterr().out
    assert (
        "was resized to cover 32 x 32 pixels, bilinear with antialiasing; center crop; then it was normalized" in text
    )
    assert "[red]large.png" in text
    assert not (trained / "predictions").exists()


@pytest.mark.slow
def test_pictures_show_each_image_with_its_prediction(
    trained: Path, digits: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures: a row and a seventh panel in the first, and the two images that remain in the second."""
    monkeypatch.setattr(predict, "IMAGES_PER_FIGURE", 7)
    pictures = record_pictures(monkeypatch)
    files = sorted(digits.iterdir())[:9]
    results = predicted(capsys, trained, *files, "--show", "--output", tmp_path / "shown")
    assert {path.name: len(picture.panels) for path, picture in pictures.items()} == {"1.png": 7, "2.png": 2}
    panels = [panel for picture in pictures.values() for panel in picture.panels]
    captions = [axes.get_title() for picture in pictures.values() for axes in picture.axes]
    for path, panel, caption, result in zip(files, panels, captions, results, strict=True):
        shown = np.array(Image.fromarray(panel).resize((32, 32), Image.Resampling.BOX)).astype(float)
        with Image.open(path) as image:
            assert np.abs(shown - np.array(image.convert("RGB"))).mean() < 20, f"{path} is not shown in its place"
        best = result["top"][0]
        assert caption == f"{path.name}\n{best['class']} {best['probability']:.1%}"
        assert any(caption in picture.texts for picture in pictures.values())


def test_a_batch_without_a_readable_image_does_not_change_the_others(
    trained: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(predict, "_draw", lambda predictions, images, folder: drawn.append(images))
    good, broken = next(iter(sorted(digits.iterdir()))), tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        main(["predict", str(trained), str(good), str(broken), "--show", "--batch-size", "1"])
    (images,) = drawn
    with Image.open(good) as picture:
        assert images.dtype == torch.uint8 and np.array_equal(images[0].permute(1, 2, 0), np.array(picture))


@pytest.mark.parametrize("name", ["BMW.png", "P5_01.png"])
def test_file_names_that_start_like_image_signatures(
    name: str, trained: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(name)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{name}\n".encode())))
    assert [one["image"] for one in predicted(capsys, trained, "-")] == [name]


def test_an_encoding_that_lacks_characters(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("日本.png")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    main(["predict", str(trained), "日本.png", "--top", "1"])
    sys.stdout.flush()
    assert b"u65e5" in out.getvalue()


def test_closed_streams(trained: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit):
        main(["predict", str(trained), "-"])
    assert "standard input holds neither" in one_line_error(capsys.readouterr().err)
    monkeypatch.setattr(sys, "stdout", None)
    main(["predict", str(trained), str(digits)])


@pytest.mark.parametrize("kind", ["image", "names"])
def test_standard_input(
    kind: str, trained: Path, digits: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(digits.iterdir())[:2]
    content = files[0].read_bytes() if kind == "image" else "\n".join(map(str, files)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    results = predicted(capsys, trained, "-")
    assert [one["image"] for one in results] == (["-"] if kind == "image" else [str(path) for path in files])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "predict takes images after the run"),
        (("*.nothing",), "no file matches '*.nothing'"),
        ((".",), "folder . holds no images; allowed extensions: .apng"),
    ],
)
def test_nothing_to_predict(
    images: tuple[str, ...],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(trained), *images])
    assert stop.value.code == 2
    assert message in one_line_error(capsys.readouterr().err)


def test_several_processes_are_refused(
    trained: Path, digits: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["predict", str(trained), str(digits)])
    assert one_line_error(capsys.readouterr().err).startswith("predict runs in one process, and the launch started 2")

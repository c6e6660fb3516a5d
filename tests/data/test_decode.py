"""Image files of all kinds are decoded to the right values; damaged ones are found before a training."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from fastvit_train.cli.main import main
from fastvit_train.config.overrides import validate
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import DataConfig, TrainConfig
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.decode import decode
from fastvit_train.data.rendering import Rendering, to_gray
from fastvit_train.inference.trained_model import load_run
from fastvit_train.training.loop import fit, train
from fastvit_train.utils.errors import UserError
from tests.support import launch, one_line_error, rgb, write_folder

RED, WHITE = (200, 0, 0), (255, 255, 255)


def load(root: Path, **settings: object) -> DatasetSpec:
    return load_dataset(DataConfig(dataset="folder", data_dir=str(root), **settings), rgb(32), examine_streamed=True)


def drawing(mode: str, suffix: str, path: Path) -> Path:
    """Write a drawing of 32 x 32 pixels: the upper half is a dark gray or red, the lower half black and transparent."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16] = (*RED, 255)
    image = Image.fromarray(rgba)
    options: dict[str, object] = {}
    if mode == "P and bytes":
        image = Image.new("P", (32, 32), 1)
        image.putpalette([*RED, 0, 0, 0])
        image.paste(0, (0, 0, 32, 16))
        options["transparency"] = b"\xff\x00"
    elif mode == "P and a number":
        image = Image.new("P", (32, 32), 1)
        image.putpalette([*RED, 0, 0, 0])
        image.paste(0, (0, 0, 32, 16))
        options["transparency"] = 1
    elif mode == "RGB and a color":
        image, options["transparency"] = image.convert("RGB"), (0, 0, 0)
    elif mode == "L and a number":
        image, options["transparency"] = image.convert("RGB").convert("L"), 0
    elif mode == "I;16 and a number":
        gray = np.asarray(image.convert("RGB").convert("L")).astype(np.uint16) * 257
        image, options["transparency"] = Image.fromarray(gray), 0
    elif mode == "1 and a number":
        image, options["transparency"] = image.convert("RGB").getchannel(0).point(lambda v: 255 * (v > 9), "1"), 0
    else:
        image = image.convert(mode)
    path = path.with_suffix(suffix)
    image.save(path, **options)
    return path


DRAWINGS = [
    ("RGBA", ".png"), ("LA", ".png"), ("P and bytes", ".png"), ("P and a number", ".png"), ("P and a number", ".gif"),
    ("RGB and a color", ".png"), ("L and a number", ".png"), ("I;16 and a number", ".png"), ("1 and a number", ".png"),
    ("RGBA", ".tiff"), ("LA", ".tiff"), ("RGBA", ".webp"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "suffix"), DRAWINGS)
def test_transparent_parts_are_composed_on_the_background(tmp_path: Path, mode: str, suffix: str) -> None:
    path = drawing(mode, suffix, tmp_path / "drawing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_white = decode(path, rgb(32)).permute(1, 2, 0)
    top = on_white[4, 4].tolist()
    assert on_white[28, 28].tolist() == list(WHITE)
    if mode.startswith(("RGB", "P")):
        assert np.abs(np.array(top) - RED).max() <= 8
    else:
        assert top[0] == top[1] == top[2] == (255 if mode.startswith("1") else pytest.approx(60, abs=1))
    assert decode(path, rgb(32), Rendering("#102030")).permute(1, 2, 0)[28, 28].tolist() == [16, 32, 48]


def test_opaque_images_with_an_alpha_channel_keep_their_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.putalpha(255)
    image.save(tmp_path / "opaque.png")
    assert np.array_equal(decode(tmp_path / "opaque.png", rgb(32)).permute(1, 2, 0).numpy(), pixels)


def stripes(path: Path) -> Path:
    """Write an image of 60 x 30 pixels: from left to right, 15 columns each of red, green, blue and white."""
    columns = np.repeat(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], np.uint8), 15, axis=0)
    Image.fromarray(np.tile(columns, (30, 1, 1))).save(path)
    return path


PURE_RED, GREEN, BLUE, GRAY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


@pytest.mark.parametrize(
    ("rendering", "corners", "middle"),
    [
        (Rendering(), (GREEN, BLUE), (GREEN, BLUE)),  # the middle 30 columns
        (Rendering(crop_pct=0.5), (GREEN, BLUE), (GREEN, BLUE)),
        (Rendering(fit="stretch"), (PURE_RED, WHITE), (GREEN, BLUE)),
        (Rendering("gray", fit="pad"), (GRAY, GRAY), (GREEN, BLUE)),
    ],
)
def test_images_that_are_not_square(tmp_path: Path, rendering: Rendering, corners: tuple, middle: tuple) -> None:
    pixels = decode(stripes(tmp_path / "wide.png"), rgb(64), rendering).permute(1, 2, 0)
    assert pixels.shape == (64, 64, 3)
    assert (tuple(pixels[2, 4].tolist()), tuple(pixels[2, -5].tolist())) == corners
    assert (tuple(pixels[32, 24].tolist()), tuple(pixels[32, 39].tolist())) == middle
    if rendering.fit == "pad":  # the whole image, 64 x 32 pixels, between borders of 16 each
        rows = (pixels[:, 4] == torch.tensor(PURE_RED)).all(1).nonzero()[:, 0].tolist()
        assert rows == list(range(16, 48))


@pytest.mark.parametrize(
    ("fit", "corners", "middle"),
    [
        ("crop", (PURE_RED, WHITE), (GREEN, BLUE)),  # the middle 20 rows
        ("stretch", (PURE_RED, WHITE), (GREEN, BLUE)),
        ("pad", (GRAY, GRAY), (GREEN, BLUE)),  # 40 x 20 pixels between borders of 20 columns each
    ],
)
def test_inputs_that_are_not_square(tmp_path: Path, fit: str, corners: tuple, middle: tuple) -> None:
    width = 60 if fit == "crop" else 80
    size = InputSize(3, 20, width)
    pixels = decode(stripes(tmp_path / "wide.png"), size, Rendering("gray", fit)).permute(1, 2, 0)
    assert pixels.shape == (20, width, 3)
    assert (tuple(pixels[2, 4].tolist()), tuple(pixels[2, -5].tolist())) == corners
    assert (tuple(pixels[10, width // 2 - 4].tolist()), tuple(pixels[10, width // 2 + 3].tolist())) == middle
    reds = (pixels == torch.tensor(PURE_RED)).all(2).nonzero()[:, 1].unique().tolist()
    assert reds[0] == {"crop": 0, "stretch": 0, "pad": 20}[fit]


def test_gray_levels_are_pillows(tmp_path: Path, seed: int) -> None:
    pixels = torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8)
    for number, image in enumerate(pixels):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(path := tmp_path / f"{number}.png")
        expected = torch.from_numpy(np.array(picture.convert("L")))[None]
        assert torch.equal(to_gray(pixels)[number], expected)
        assert torch.equal(decode(path, InputSize(1, 64, 48)), expected)
    gray = pixels[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(to_gray(gray), pixels[:, :1]), "levels that were gray before stay as they were"


def test_a_part_of_the_crop_is_kept(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    kept = decode(tmp_path / "ramp.png", rgb(50), Rendering(crop_pct=0.5))
    assert np.array_equal(kept[0].numpy(), ramp[25:75, 25:75])  # no pixel is resized


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["never", "always"])
def test_training_and_prediction_render_images_alike(tmp_path: Path, stream: str) -> None:
    root = write_folder(tmp_path / "data")
    stripes(root / "train" / "circle" / "wide.png")
    for fit_name in ("crop", "pad"):
        dataset = load(root, stream=stream, fit=fit_name)
        sample = 12  # the last one of the first class
        wide = dataset.train.pixels(torch.tensor([sample]), rgb(32))[0]
        expected = decode(root / "train" / "circle" / "wide.png", rgb(32), Rendering(fit=fit_name))
        assert torch.equal(wide, expected), fit_name
    settings = {"dataset": "folder", "data_dir": str(root), "fit": "pad", "runs_dir": str(tmp_path / "runs")}
    train(exp_name="run", epochs=1, batch_size=8, attention="fused", **settings)
    assert load_run(tmp_path / "runs" / "run").rendering == Rendering(fit="pad")


def test_a_part_of_a_crop_needs_a_crop() -> None:
    with pytest.raises(UserError, match=r"^--crop-pct is for --fit crop; leave it out, or leave out --fit pad$"):
        validate(TrainConfig(data=DataConfig(fit="pad", crop_pct=0.9)))


@pytest.mark.parametrize("stream", ["never", "always"])
def test_training_composes_drawings_and_says_so_once(
    tmp_path: Path, stream: str, small_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    for number in range(2):
        drawing("RGBA", ".png", root / "train" / "circle" / f"z{number}")
    line = "2 images have an alpha channel or a transparent color; they are composed on gray (--background)"
    for _ in range(2):  # the second time from the cache
        dataset = load(root, stream=stream, background="gray")
        assert dataset.notes == (line,)
        assert dataset.train.pixels(torch.tensor([3]), rgb(32))[0, :, 28, 28].tolist() == [128] * 3
    assert load(root, stream=stream).train.pixels(torch.tensor([3]), rgb(32))[0, :, 28, 28].tolist() == [255] * 3
    settings = {"dataset": "folder", "data_dir": str(root), "stream": stream, "background": "gray"}
    fit(small_config(**settings, epochs=1, batch_size=6))
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.slow
def test_predict_and_inspect_compose_drawings_and_say_so_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def see(files: object, size: int) -> object:
        seen.append(files.rendering.background)  # type: ignore[attr-defined]
        raise UserError("seen")

    for number in range(300):
        drawing("P and bytes", ".png", tmp_path / f"{number}")
    filters = list(warnings.filters)
    main(["predict", str(trained), str(tmp_path), "--json"])
    printed = capsys.readouterr()
    assert warnings.filters == filters, "threads must not leave warnings switched off"
    assert printed.err == "300 images have an alpha channel or a transparent color; they are composed on white\n"
    assert printed.out.count("\n") == 300
    monkeypatch.setattr("fastvit_train.inference.inspect.decode_all", see)
    with pytest.raises(SystemExit):
        main(["inspect", str(trained), str(tmp_path / "0.png")])
    assert seen == ["white"]


def test_a_background_that_is_no_color_is_refused() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--background", "purplish", "--dry-run"])
    assert stop.value.code == 2


def tiff(path: Path, values: np.ndarray, black: float | None = None, white: float | None = None) -> Path:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if black is not None:
        for tag, value in ((340, black), (341, white)):
            tags.tagtype[tag] = 12
            tags[tag] = value
    Image.fromarray(values).save(path, tiffinfo=tags)
    return path


RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
EXPECTED = np.rint(RAMP * 255)


@pytest.mark.parametrize(
    ("dtype", "black", "white"),
    [
        (np.uint16, None, None),
        (np.uint16, 0, 4095),
        (np.float32, 0, 1),
        (np.float32, -3, 7),
        (np.int32, 0, 255),
        (np.int32, -1000, 3000),
    ],
)
def test_tiffs_are_scaled_by_the_range_that_the_file_states(
    tmp_path: Path, dtype: type, black: float | None, white: float | None
) -> None:
    low, high = (0, 65535) if black is None else (black, white)
    values = (low + RAMP * (high - low)).astype(dtype)
    shown = decode(tiff(tmp_path / "ramp.tiff", values, black, white), rgb(32))
    assert np.abs(shown.numpy() - EXPECTED).max() <= 1 and shown.max() == 255


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("white", [1, 255, 10**6])
def test_tiffs_that_state_no_range_are_refused_with_their_name(tmp_path: Path, dtype: type, white: int) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    tiff(root / "train" / "circle" / "ramp.tif", (RAMP * white).astype(dtype))
    for stream in ("always", "never"):
        with pytest.raises(UserError, match=r"ramp\.tif can't be decoded .its pixels are .* nothing says which values"):
            load(root, stream=stream)


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "I;16"), (".tiff", "I;16"), (".tiff", "I;16B"), (".pgm", "I")])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str, mode: str) -> None:
    values = (RAMP * 65535).round().astype(np.uint16)
    path = tmp_path / f"ramp{suffix}"
    if mode == "I":
        path.write_bytes(b"P5 32 32 65535\n" + values.astype(">u2").tobytes())
    elif mode == "I;16B":
        Image.frombytes("I;16B", (32, 32), values.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(values).save(path)
    assert np.abs(decode(path, rgb(32)).numpy() - EXPECTED).max() <= 1


def test_white_may_be_zero(tmp_path: Path) -> None:
    values = (RAMP * 65535).round().astype(np.uint16)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    path = tmp_path / "negative.tiff"
    Image.fromarray(values).save(path, tiffinfo=tags)
    content = bytearray(path.read_bytes())
    at = content.index(np.array([262, 3], "<u2").tobytes())
    content[at + 8 : at + 10] = bytes(2)
    path.write_bytes(content)
    assert np.abs(decode(path, rgb(32)).numpy() - EXPECTED[::-1, ::-1]).max() <= 1


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """Photos with fifteen damaged images in test/, in five ways that the header or the end shows."""
    root = write_folder(tmp_path / "photos", per_class=20)
    for number in range(15):
        path = root / "test" / "square" / f"{number}.png"
        content = path.read_bytes()
        ways = (b"", b"hello", content[:-100], content[:20], content[: len(content) // 2])
        path.write_bytes(ways[number % 5])
    yield root


@pytest.mark.parametrize("stream", ["always", "never"])
def test_all_damaged_images_are_listed_before_training(
    damaged: Path, stream: str, small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = {"dataset": "folder", "data_dir": str(damaged), "stream": stream}
    with pytest.raises(UserError, match="15 of 80 images can't be decoded; replace or remove them: ") as error:
        fit(small_config(**settings, epochs=1, batch_size=40))
    message = str(error.value)
    assert message.count(".png (") == 10
    whole = Path(message.rpartition("all of them are listed in ")[2])
    assert set(whole.read_text().splitlines()) == {str(damaged / "test/square" / f"{n}.png") for n in range(15)}
    assert not (tmp_path / "runs" / "run").exists()


def test_damage_that_only_decoding_shows_is_listed_as_a_whole_too(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", per_class=3)
    for path in ("train/circle/1.png", "test/square/2.png"):
        _damage_in_the_middle(root / path)
    with pytest.raises(
        UserError, match=r"2 of 12 images can't be decoded.*train/circle/1.png \(.*test/square/2.png \("
    ):
        load(root)


def test_streamed_files_are_examined_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    notes = load(root, stream="always").notes
    with monkeypatch.context() as patch:
        patch.setattr("fastvit_train.data.sources.folder.examine", None)
        assert load(root, stream="always").notes == notes
    (root / "test" / "circle" / "0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"0.png can't be decoded"):
        load(root, stream="always")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_cut_file_of_every_format_is_found_before_training(tmp_path: Path, kind: str) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    path = root / "test" / "circle" / f"cut.{kind.lower()}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=kind)
    assert len(load(root, stream="always").test.labels) == 5
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match=f"cut.{kind.lower()} can't be decoded"):
        load(root, stream="always")


def _damage_in_the_middle(path: Path) -> None:
    """Damage an image's data, so that neither the header nor the end shows it."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_whichever_rank_finds_a_damaged_image_the_run_leaves_nothing(tmp_path: Path, number: int) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    _damage_in_the_middle(root / "test" / "circle" / f"{number}.png")
    small = ("--epochs", 1, "--batch-size", 4, "--eval-batch-size", 1, "--depth", 1, "--embed-dim", 8, "--num-heads", 1)
    data = ("--dataset", "folder", "--data-dir", root, "--stream", "always", "--attention", "fused")
    done = launch(*small, *data, "--runs-dir", tmp_path / "runs", "--exp-name", "run", processes=2)
    assert done.returncode and f"{number}.png can't be decoded" in one_line_error(done.stderr)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_with_an_error_removes_the_unfinished_run(
    tmp_path: Path, rank: int, small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "photos", per_class=2)
    _damage_in_the_middle(root / "test" / "circle" / "0.png")
    if rank:
        from fastvit_train.training import loop

        train = loop._train

        def on_another_rank(session: object, *arguments: object) -> object:
            monkeypatch.setattr(type(session.accelerator), "is_main_process", False)  # type: ignore[attr-defined]
            return train(session, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "_train", on_another_rank)
    settings = {"dataset": "folder", "data_dir": str(root), "stream": "always"}
    with pytest.raises(UserError, match=r"0.png can't be decoded"):
        fit(small_config(**settings, epochs=1, batch_size=4))
    assert not (tmp_path / "runs" / "run").exists()

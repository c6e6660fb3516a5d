"""Data sets are read correctly; errors name what is missing or damaged."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.decode import decode
from fastvit_train.data.images import StreamedImages
from fastvit_train.data.sources import folder
from fastvit_train.utils.errors import UserError
from tests.support import rgb, write_folder


def load(name: str, data_dir: Path, **settings: object) -> DatasetSpec:
    return load_dataset(DataConfig(dataset=name, data_dir=str(data_dir), **settings), rgb(32))


def test_digits_are_scikit_learns_split_by_class() -> None:
    dataset = load("digits", Path("nowhere"))
    assert len(dataset.train.labels) + len(dataset.test.labels) == 1797
    for label in range(10):
        share = (dataset.test.labels == label).sum() / (
            (dataset.test.labels == label).sum() + (dataset.train.labels == label).sum()
        )
        assert abs(float(share) - 0.2) < 0.005
    assert dataset.train.images.shape[1:] == (3, 32, 32) and dataset.train.images.dtype == torch.uint8
    assert int(dataset.train.images.max()) == 255


def test_holdout_comes_out_of_the_training_set_and_leaves_the_test_set_alone() -> None:
    whole, held = load("digits", Path("nowhere")), load("digits", Path("nowhere"), holdout=0.25)
    assert held.evaluated_on == "holdout"
    assert len(held.train.labels) + len(held.test.labels) == len(whole.train.labels)
    rows = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in held.test.images} <= rows
    assert not {i.numpy().tobytes() for i in held.test.images} & {i.numpy().tobytes() for i in held.train.images}


def test_folder_is_decoded_once_and_then_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "shapes", classes=("a b", "ü", "c"))
    first = load("folder", root)
    assert first.classes == ("a b", "c", "ü") and first.name == "shapes"
    expected = np.asarray(Image.open(root / "train" / "ü" / "10.png"))
    position = [path.name for path in folder.list_images(root).train[0]].index("10.png", 24)
    assert np.array_equal(first.train.images[position].permute(1, 2, 0).numpy(), expected)
    monkeypatch.setattr(folder, "StreamedImages", None)
    assert torch.equal(load("folder", root).train.images, first.train.images)
    monkeypatch.undo()
    Image.new("RGB", (32, 32)).save(root / "train" / "c" / "0.png")
    assert not torch.equal(load("folder", root).train.images, first.train.images), "a changed file must be seen"


def test_streamed_images_are_the_decoded_ones(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "shapes", size=40)
    decoded, streamed = load("folder", root), load("folder", root, stream="always")
    assert not isinstance(streamed.train.images, torch.Tensor)
    samples = [torch.tensor([3, 0, 20]), torch.tensor([7])]
    batches = StreamedImages(streamed.train.images, rgb(32), torch.device("cpu")).batches(samples)
    for samples_B, batch in zip(samples, batches, strict=True):
        assert torch.equal(batch, decoded.train.images[samples_B])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
@pytest.mark.parametrize("size", [(32, 32), (50, 20), (7, 90)])
def test_every_kind_of_image_becomes_rgb_of_one_size(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    root = write_folder(tmp_path / "shapes")
    suffix = "tiff" if mode in ("CMYK", "I;16") else "png"
    grey = Image.fromarray(np.full((size[1], size[0]), 128, np.uint8))
    image = Image.fromarray(np.full((size[1], size[0]), 128 << 8, np.uint16)) if mode == "I;16" else grey.convert(mode)
    image.save(root / "train" / "circle" / f"odd.{suffix.upper()}")
    dataset = load("folder", root)
    position = [path.stem for path in folder.list_images(root).train[0]].index("odd")
    pixels = dataset.train.images[position].float()
    assert pixels.shape == (3, 32, 32)
    if mode != "1":
        assert (pixels - 128).abs().max() <= 3


def test_images_of_odd_sizes_and_kinds_are_right(tmp_path: Path) -> None:
    grey = np.full((8, 8), 0x80FF, ">u2")
    (tmp_path / "16 bits.pgm").write_bytes(b"P5 8 8 65535\n" + grey.tobytes())
    assert set(decode(tmp_path / "16 bits.pgm", rgb(8)).unique().tolist()) == {128}
    for size in ((1, 1), (1, 60_000), (60_000, 1), (1, 2)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "odd.png")
        assert decode(tmp_path / "odd.png", rgb(32)).float().mean((1, 2)).tolist() == [10, 20, 30]
    frames = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (50, 200, 100)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert int(decode(tmp_path / "many.gif", rgb(8))[0].max()) == 50, "the first frame"
    lying = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, 0).repeat(4, 1))  # dark left, bright right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", rgb(8))[0].float()
    assert turned[:4].mean() == 0 and turned[4:].mean() == 255


def test_an_image_at_the_limit_decodes_and_one_pixel_more_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "it.png")
    monkeypatch.setattr("fastvit_train.data.decode.MAX_PIXELS", 100)
    decode(tmp_path / "it.png", rgb(8))
    monkeypatch.setattr("fastvit_train.data.decode.MAX_PIXELS", 99)
    with pytest.raises(UserError, match=r"it.png can't be decoded \(10 x 10 pixels; at most 99 are allowed"):
        decode(tmp_path / "it.png", rgb(8))
    monkeypatch.undo()
    monkeypatch.setattr("fastvit_train.data.decode.MAX_FILE_BYTES", 20)
    with pytest.raises(UserError, match="not a regular file of at most 20 bytes"):
        decode(tmp_path / "it.png", rgb(8))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "is not a folder; expected"),
        (lambda r: [shutil.rmtree(p) for p in r.iterdir()], "is empty; expected"),
        (lambda r: shutil.rmtree(r / "test"), "has no test/"),
        (lambda r: [shutil.rmtree(p) for p in (r / "train").iterdir()], "train has no class folders"),
        (
            lambda r: (r / "test" / "square").rename(r / "test" / "triangle"),
            r"only in train/ \['square'\].*\['triangle'\]",
        ),
        (lambda r: [p.unlink() for p in (r / "train" / "square").iterdir()], "square holds no images"),
        (lambda r: _truncate(r / "train" / "square" / "5.png"), r"square/5.png can't be decoded"),
        (lambda r: (r / "test" / "circle" / "5.png").write_text("hello"), r"circle/5.png can't be decoded"),
    ],
    ids=["missing", "empty", "no-test", "no-classes", "other-classes", "empty-class", "truncated", "text"],
)
def test_folders_that_cannot_be_trained_on(tmp_path: Path, break_it, message: str) -> None:
    root = write_folder(tmp_path / "shapes")
    break_it(root)
    with pytest.raises(UserError, match=message):
        load("folder", root)


def test_odd_but_legitimate_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "shapes")
    circle = root / "train" / "circle"
    (circle / "loop").symlink_to(circle, target_is_directory=True)
    os.rename(circle / "0.png", os.fsencode(circle) + b"/caf\xe9.png")
    (root / "train" / "square").rename(tmp_path / "elsewhere")
    (root / "train" / "square").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    assert len(load("folder", root).train.labels) == 24
    (circle / "broken.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"broken\.png can't be (read|decoded)"):
        load("folder", root)


def test_val_is_used_as_test_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "shapes")
    (root / "test").rename(root / "val")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "circle" / ".hidden.png").write_text("not an image")
    (root / "train" / "circle" / "notes.txt").write_text("not an image")
    dataset = load("folder", root)
    assert dataset.evaluated_on == "val" and len(dataset.train.labels) == 24


def test_synthetic_is_the_same_every_time() -> None:
    assert torch.equal(load("synthetic", Path()).train.images, load("synthetic", Path()).train.images)

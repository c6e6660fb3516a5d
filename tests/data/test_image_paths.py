"""One rule for which files and folders are images and classes, in training, predict and inspect alike."""

import io
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastvit_train.config.schema import DataConfig, TrainConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.data.decode import FORMATS
from fastvit_train.data.sources.folder import list_images
from fastvit_train.data.sources.image_paths import EXTENSIONS, describe, expand_paths, find_images
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.support import rgb, write_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A data set whose class train/circle holds 12 images, and what real folders hold besides."""
    root = write_folder(tmp_path / "photos")
    circle = root / "train" / "circle"
    picture = (circle / "0.png").read_bytes()
    (root / "train" / ".git").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "stray.png").write_bytes(picture)
    (circle / ".ipynb_checkpoints").mkdir()
    (circle / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(picture)
    (circle / "._0.png").write_bytes(b"not an image")
    for name in ("a.HEIC", "b.heic", "notes.txt", "README"):
        (circle / name).write_bytes(b"not an image")
    return root


def names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)[0]]


def test_hidden_and_system_folders_are_neither_classes_nor_read(photos: Path) -> None:
    listing = list_images(photos)
    assert listing.classes == ("circle", "square")
    assert len(listing.train[0]) == 24 and not any("checkpoint" in str(path) for path in listing.train[0])


def test_what_is_passed_over_is_counted_and_printed_once(
    photos: Path, small_config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "4 files are not images we read: .heic 2, .txt 1, no extension 1; 1 image is not in a class folder; "
        "passed over: 4 hidden files and folders"
    )
    assert describe(list_images(photos).passed_over) == line
    fit(small_config(dataset="folder", data_dir=str(photos), epochs=1, batch_size=24))
    assert capsys.readouterr().out.count(line) == 1


def test_the_line_of_the_passed_over() -> None:
    assert describe(Counter({".heic": 9, ".txt": 3})) == "12 files are not images we read: .heic 9, .txt 3"
    assert describe(Counter({".txt": 1})) == "1 file is not an image we read: .txt 1"
    assert describe(Counter()) == ""
    many = describe(Counter({f".{letter}": 1 for letter in "abcdefghijklmno"}))
    assert many.startswith("15 files are not images we read: .a 1, .b 1, ") and many.endswith(".j 1, ...")


def test_linked_folders_are_followed_without_cycles(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "shapes")
    circle = root / "train" / "circle"
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere / "deep", elsewhere / ".hidden", circle / "sub"):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "linked.png")
    links = {"more": elsewhere, "loop": circle, "above": root, "again": circle / "sub", ".dark": elsewhere}
    for name, target in links.items():
        (circle / name).symlink_to(target, target_is_directory=True)
    (elsewhere / "back").symlink_to(circle, target_is_directory=True)
    plain = sorted(f"{number}.png" for number in range(12))
    assert names_in(circle) == sorted([*plain, "more/deep/linked.png", "sub/linked.png"])
    (root / "train" / "square").rename(tmp_path / "a class elsewhere")
    (root / "train" / "square").symlink_to(tmp_path / "a class elsewhere", target_is_directory=True)
    assert list_images(root).classes == ("circle", "square")


def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "shapes")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (root / "train" / "circle" / "sub").mkdir()
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match="circle/sub can't be read .Permission denied."):
        list_images(root)


def test_every_extension_of_the_formats_counts_in_any_case(tmp_path: Path) -> None:
    Image.init()
    floats_only = {".pfm"}  # its format says nothing about the values of black and white
    known = {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}
    assert known - floats_only == EXTENSIONS
    for extension in EXTENSIONS:
        Image.new("RGB", (8, 8)).save(tmp_path / f"x{extension.upper()}", format="PNG")
    assert len(names_in(tmp_path)) == len(EXTENSIONS)


@pytest.mark.parametrize("given", ["folder", "pattern", "**", "standard input"])
def test_predict_and_inspect_follow_the_same_rule(
    photos: Path, given: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    circle = photos / "train" / "circle"
    (circle / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(circle / "sub" / "deep.JFIF")
    names = {"folder": str(circle), "pattern": f"{circle}/*", "**": f"{circle}/**", "standard input": "-"}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{circle}\n".encode())))
    with caplog.at_level(logging.WARNING), expand_paths([names[given]], "predict") as files:
        found = [path for _, path in files]
    assert sorted(found) == find_images(circle)[0] and len(found) == 13
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("4 files are not images we read: .heic 2, .txt 1, no extension 1")


def test_a_file_that_is_named_itself_counts_whatever_its_extension(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image", format="PNG")
    with expand_paths([str(tmp_path / "image")], "predict") as files:
        assert files == [(str(tmp_path / "image"), tmp_path / "image")]
    with pytest.raises(UserError, match=r"matches no images .1 file is not an image we read: no extension 1.; allowed"):
        expand_paths([f"{tmp_path}/ima*"], "predict").__enter__()


def test_a_class_without_images_says_what_it_holds_instead(photos: Path) -> None:
    for path in (photos / "train" / "square").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"square holds no images .12 files are not images we read: .heic 12."):
        load_dataset(DataConfig(dataset="folder", data_dir=str(photos)), rgb(32))

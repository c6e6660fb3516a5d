"""Data sets: what is there is read right, what is damaged is named."""

import gzip
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_train.config.schema import DataConfig
from fastvit_train.data import cifar, folder
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.download import download, md5_of
from fastvit_train.data.images import StreamedImages, decode
from fastvit_train.utils.errors import UserError
from tests.support import idx_bytes, write_cifar10, write_folder

OFFLINE = "http://127.0.0.1:9"


def load(name: str, data_dir: Path, **settings: object) -> DatasetSpec:
    return load_dataset(DataConfig(dataset=name, data_dir=str(data_dir), data_url=OFFLINE, **settings), 32)


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


def test_cifar10_in_torchvisions_layout(tmp_path: Path) -> None:
    dataset = load("cifar10", write_cifar10(tmp_path))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (100, 20)
    assert dataset.classes[3] == "class 3" and dataset.name == "CIFAR-10"
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("rb") as file:
        original = pickle.load(file, encoding="bytes")
    assert np.array_equal(dataset.train.images[20].numpy().ravel(), original[b"data"][0])
    assert torch.equal(load("cifar10", tmp_path / "cifar-10-batches-py").train.images, dataset.train.images)


def test_cifar10_from_a_local_archive_whose_checksum_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "unpacked")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "unpacked" / "cifar-10-batches-py", "cifar-10-batches-py")
    with pytest.raises(UserError, match="is damaged or another file: MD5"):
        load("cifar10", tmp_path)
    monkeypatch.setattr("fastvit_train.data.cifar.check_md5", lambda path, expected: None)
    assert len(load("cifar10", tmp_path).train.labels) == 100


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_batches_pickled_another_way(tmp_path: Path, protocol: int) -> None:
    folder = write_cifar10(tmp_path) / "cifar-10-batches-py"
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [np.int64(i) for i in range(3)]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    (folder / "batches.meta").unlink()
    dataset = load("cifar10", tmp_path)
    assert dataset.test.labels.tolist() == [0, 1, 2] and dataset.classes == tuple("0123456789")


@pytest.mark.parametrize("labels", [["a"] * 3, None, [0.5] * 3, [1, 2]], ids=str)
def test_cifar_labels_that_are_none(tmp_path: Path, labels: object) -> None:
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": labels}
    (write_cifar10(tmp_path) / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match=r"test_batch has uint8 \(3, 3072\) data .* expected uint8"):
        load("cifar10", tmp_path)


def test_a_cifar_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"data_batch_3 is damaged \(it asks for builtins.exec"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "data_batch_4").unlink(), "data_batch_4 is missing"),
        (
            lambda f: (f / "data_batch_4").write_bytes((f / "data_batch_4").read_bytes()[:5000]),
            "data_batch_4 is damaged",
        ),
        (
            lambda f: (f / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((2, 5), np.uint8)})),
            "expected uint8",
        ),
    ],
    ids=["missing", "truncated", "shape"],
)
def test_damaged_cifar_batches_are_named(tmp_path: Path, break_it, message: str) -> None:
    break_it(write_cifar10(tmp_path) / "cifar-10-batches-py")
    with pytest.raises(UserError, match=message):
        load("cifar10", tmp_path)


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labels from 0 to 11, outside the 10 classes"):
        load("cifar10", write_cifar10(tmp_path, labels=12))


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_raw_and_gzipped_idx_files(tmp_path: Path, where: str, suffix: str) -> None:
    target = tmp_path / where
    target.mkdir(parents=True, exist_ok=True)
    pixels = {"train": np.random.default_rng(0).integers(0, 256, (30, 28, 28)), "t10k": np.zeros((10, 28, 28))}
    for part, images in pixels.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images)) % 10)):
            content = idx_bytes(array)
            path = target / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    dataset = load("fashion-mnist", tmp_path)
    assert dataset.train.images.shape == (30, 3, 32, 32) and len(dataset.classes) == 10
    assert np.array_equal(dataset.train.images[7, 1, 2:30, 2:30].numpy(), pixels["train"][7])
    labels = target / f"train-labels-idx1-ubyte{suffix}"
    labels.write_bytes(labels.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte(\.gz)? (can't be read|holds 25 bytes)"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_without_a_network_it_says_where_to_put_the_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"can't download http.*put .* into {tmp_path}.*digits.*need no network"):
        load(name, tmp_path)
    assert not list(tmp_path.rglob("*"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="can't download"):
        load(name, tmp_path / "file")


@pytest.mark.parametrize("url", ["http://exa mple/x", "http://[::1/x", "ftp://x", "nonsense"])
def test_mirrors_that_are_no_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="can't download"):
        load_dataset(DataConfig(dataset="cifar10", data_dir=str(tmp_path), data_url=url), 32)


def test_a_download_from_a_mirror_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"content" * 100_000)
    target = tmp_path / "data" / "target.bin"
    download(source.as_uri(), target, md5_of(source), put="target.bin")
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    with pytest.raises(UserError, match=r"can't download .*source.bin \(it has MD5"):
        download(source.as_uri(), target, "0" * 32, put="target.bin")
    assert not list(target.parent.iterdir())


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
    batches = StreamedImages(streamed.train.images, 32, torch.device("cpu")).batches(samples)
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
    assert set(decode(tmp_path / "16 bits.pgm", 8).unique().tolist()) == {128}
    for size in ((1, 1), (1, 60_000), (60_000, 1), (1, 2)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "odd.png")
        assert decode(tmp_path / "odd.png", 32).float().mean((1, 2)).tolist() == [10, 20, 30]
    frames = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (50, 200, 100)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert int(decode(tmp_path / "many.gif", 8)[0].max()) == 50, "the first frame"
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", 8)[:, 0, 0].tolist() == [10, 20, 30]
    lying = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, 0).repeat(4, 1))  # dark left, bright right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 8)[0].float()
    assert turned[:4].mean() == 0 and turned[4:].mean() == 255


def test_an_image_at_the_limit_decodes_and_one_pixel_more_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "it.png")
    monkeypatch.setattr("fastvit_train.data.images.MAX_PIXELS", 100)
    decode(tmp_path / "it.png", 8)
    monkeypatch.setattr("fastvit_train.data.images.MAX_PIXELS", 99)
    with pytest.raises(UserError, match=r"it.png can't be decoded \(10 x 10 pixels; allowed are 99"):
        decode(tmp_path / "it.png", 8)
    monkeypatch.undo()
    monkeypatch.setattr("fastvit_train.data.images.MAX_FILE_BYTES", 20)
    with pytest.raises(UserError, match="no regular file of up to 20 bytes"):
        decode(tmp_path / "it.png", 8)


def test_a_download_larger_than_the_limit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvit_train.data.download.MAX_BYTES", 1 << 20)
    (tmp_path / "source").write_bytes(bytes(1 << 21))
    with pytest.raises(UserError, match="it is larger than 1,048,576 bytes"):
        download((tmp_path / "source").as_uri(), tmp_path / "data" / "it", md5_of(tmp_path / "source"), put="it")
    assert not list((tmp_path / "data").iterdir())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "is no folder; expected"),
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


def test_val_serves_as_test_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "shapes")
    (root / "test").rename(root / "val")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "circle" / ".hidden.png").write_text("no image")
    (root / "train" / "circle" / "notes.txt").write_text("no image")
    dataset = load("folder", root)
    assert dataset.evaluated_on == "val" and len(dataset.train.labels) == 24


def test_synthetic_is_the_same_every_time() -> None:
    assert torch.equal(load("synthetic", Path()).train.images, load("synthetic", Path()).train.images)


def test_cifar100_reads_fine_labels(tmp_path: Path) -> None:
    target = tmp_path / "cifar-100-python"
    target.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        data = np.zeros((count, 3072), np.uint8)
        batch = {"data": data, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
        (target / name).write_bytes(pickle.dumps(batch))
    (target / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    classes, train, _ = cifar.load("cifar100", tmp_path, None)
    assert len(classes) == 100 and int(train[1].max()) == 99

"""CIFAR-10, CIFAR-100 and Fashion-MNIST: what is read, what is refused, and that no unknown pickle is opened."""

import errno
import gzip
import hashlib
import os
import pickle
import pickletools
import socket
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import DatasetSpec, load_dataset
from fastvit_train.data.sources import published
from fastvit_train.data.sources.download import _ProgressBar, download
from fastvit_train.data.sources.published import CIFAR10, CIFAR100
from fastvit_train.utils.errors import UserError
from tests.reliability.malformed import Evil
from tests.support import idx_bytes, rgb, write_fashion_mnist
from tests.support.cifar import accept_cifar, write_cifar10

OFFLINE = "http://127.0.0.1:9"


def load(name: str, data_dir: Path, url: str = OFFLINE) -> DatasetSpec:
    return load_dataset(DataConfig(dataset=name, data_dir=str(data_dir), data_url=url), rgb(32))


def digest(dataset: DatasetSpec) -> str:
    """A hash of all pixels and labels."""
    hashed = hashlib.blake2b(digest_size=8)
    for split in (dataset.train, dataset.test):
        assert isinstance(split.images, torch.Tensor) and split.images.is_contiguous()
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        hashed.update(split.images.numpy().tobytes())
        hashed.update(split.labels.numpy().tobytes())
    return hashed.hexdigest()


def pack(unpacked: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, cls: type[CIFAR10] = CIFAR10) -> None:
    """Write an archive of the batches, and have its MD5 taken for the published one."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(unpacked / cls.unpacked_name, cls.unpacked_name)
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that appears if an `Evil` pickle is loaded, which must not happen."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


# CIFAR


def test_cifar10_in_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load("cifar10", write_cifar10(tmp_path, monkeypatch))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (100, 20)
    assert dataset.classes[3] == "class 3" and dataset.name == "CIFAR-10"
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("rb") as file:
        original = pickle.load(file)
    assert np.array_equal(dataset.train.images[20].numpy().ravel(), original["data"][0])
    assert digest(load("cifar10", tmp_path / "cifar-10-batches-py")) == digest(dataset)


def test_pixels_labels_and_identity_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that an earlier version trained must be resumed on the same data: these values are from 0.1.0."""
    cifar10 = load("cifar10", write_cifar10(tmp_path / "cifar10", monkeypatch))
    assert digest(cifar10) == "f11fe0a3abf64e34"
    assert cifar10.identity() == {
        "classes": [f"class {i}" for i in range(10)],
        "training images": 100,
        "test images": 20,
        "labels": "5ac9836b8d8c9611",
    }
    generator = np.random.default_rng(1)
    folder = tmp_path / "cifar100" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 200), ("test", 100)):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": data, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"n{i}" for i in range(100)]}))
    accept_cifar(CIFAR100, folder, monkeypatch)
    cifar100 = load("cifar100", tmp_path / "cifar100")
    assert (digest(cifar100), cifar100.identity()["labels"]) == ("e2e74f4054e4d4bf", "a47fcb8af48cd65c")
    assert cifar100.classes == tuple(f"n{i}" for i in range(100)) and cifar100.name == "CIFAR-100"
    train, test = (generator.integers(0, 256, (count, 28, 28)) for count in (30, 10))
    fashion = load("fashion-mnist", write_fashion_mnist(tmp_path / "fashion", train, test))
    assert (digest(fashion), fashion.identity()["labels"]) == ("2823ac72b5f6d4d0", "fe5461f6f5387bfe")
    assert fashion.classes == (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
    )  # fmt: skip


def test_cifar10_from_an_archive_in_a_folder_that_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = write_cifar10(tmp_path / "unpacked", monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    pack(unpacked, root / "cifar-10-python.tar.gz", monkeypatch)
    root.chmod(0o555)
    assert digest(load("cifar10", root)) == digest(load("cifar10", unpacked))
    assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]


def test_an_archive_with_another_md5_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path
) -> None:
    """Neither unpacked, which could write elsewhere, nor unpickled."""
    folder = write_cifar10(tmp_path / "unpacked", monkeypatch) / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Evil(marker)}))
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
        tar.add(folder / "test_batch", "../ran")
    monkeypatch.setattr(published, "extract_archive", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=r"python.tar.gz is damaged or is a different file: MD5 \w+, expected c58f"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_batch_with_another_md5_is_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, name: str
) -> None:
    file = write_cifar10(tmp_path, monkeypatch) / "cifar-10-batches-py" / name
    content = pickle.dumps({"data": Evil(marker), "label_names": Evil(marker)})
    assert "REDUCE" in [opcode.name for opcode, _, _ in pickletools.genops(content)]
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged or is a different file: MD5 .*unpack cifar-10-python"):
        load("cifar10", tmp_path)
    monkeypatch.undo()
    accept_cifar(CIFAR10, file.parent, monkeypatch)
    with pytest.raises(Exception):  # noqa: B017
        load("cifar10", tmp_path)
    assert marker.exists(), "it would have run if its MD5 were the published one"
    marker.unlink()


@pytest.mark.parametrize("change", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["data_batch_4", "batches.meta"])
def test_damaged_cifar_batches_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    file = write_cifar10(tmp_path, monkeypatch) / "cifar-10-batches-py" / name
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    message = {"missing": "is missing; unpack", "truncated": "is damaged or is a different file"}[change]
    with pytest.raises(UserError, match=f"{name} {message}"):
        load("cifar10", tmp_path)


def test_labels_outside_the_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="labels from 0 to 11, but the model has 10 classes"):
        load("cifar10", write_cifar10(tmp_path, monkeypatch, labels=12))


# Fashion-MNIST


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_fashion_mnist_from_idx_files(tmp_path: Path, where: str, packed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    folder = write_fashion_mnist(tmp_path / where, pixels, np.zeros((10, 28, 28)), packed)
    folder.chmod(0o555)
    dataset = load("fashion-mnist", tmp_path)
    assert dataset.train.images.shape == (30, 3, 32, 32) and len(dataset.classes) == 10
    assert np.array_equal(dataset.train.images[7, 1, 2:30, 2:30].numpy(), pixels[7])
    assert dataset.train.images[:, :, :2].max() == 0, "the border is black"
    assert len(list(folder.iterdir())) == 4, "nothing is unpacked into the folder"
    folder.chmod(0o755)
    labels = folder / f"train-labels-idx1-ubyte{'.gz' if packed else ''}"
    labels.write_bytes(labels.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte(\.gz can't be read| is damaged)"):
        load("fashion-mnist", tmp_path)


def test_fashion_mnist_partly_packed(tmp_path: Path) -> None:
    pixels = np.zeros((10, 28, 28))
    write_fashion_mnist(tmp_path, pixels, pixels)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    (tmp_path / f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert load("fashion-mnist", tmp_path).test.labels.tolist() == list(range(10))


def test_an_idx_file_above_the_limit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((10, 28, 28))
    write_fashion_mnist(tmp_path, pixels, pixels, packed=True)
    limit = len(idx_bytes(pixels))
    monkeypatch.setattr(published, "MAX_IDX_BYTES", limit)
    load("fashion-mnist", tmp_path)
    monkeypatch.setattr(published, "MAX_IDX_BYTES", limit - 1)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz holds more than 7,855 bytes"):
        load("fashion-mnist", tmp_path)


def test_torchvisions_old_pt_files_are_not_read(tmp_path: Path) -> None:
    """They have no published MD5."""
    pixels = np.zeros((10, 28, 28))
    folder = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", pixels, pixels).parent / "processed"
    folder.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1)), folder / name)
    assert len(load("fashion-mnist", tmp_path).train.labels) == 10


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_without_room_to_unpack_it_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fill_the_disk(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pack(write_cifar10(tmp_path / "unpacked", monkeypatch), tmp_path / "cifar-10-python.tar.gz", monkeypatch)
    write_fashion_mnist(tmp_path, np.zeros((10, 28, 28)), np.zeros((10, 28, 28)))
    monkeypatch.setattr(published, "extract_archive", fill_the_disk)
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(UserError, match=r"can't be unpacked to the temporary folder .* \(No space left.* TMPDIR"):
        load(name, tmp_path)


# Downloads


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_without_a_network_it_says_where_to_put_the_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"can't download http.*put .* into {tmp_path}.*digits.*need no network"):
        load(name, tmp_path)
    assert not list(tmp_path.rglob("*"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="can't download"):
        load(name, tmp_path / "file")


@pytest.mark.parametrize("url", ["http://exa mple/x", "http://[::1/x", "ftp://x", "nonsense"])
def test_mirrors_that_are_not_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="can't download"):
        load("cifar10", tmp_path, url)


def test_a_mirror_of_each_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpacked = write_cifar10(tmp_path / "unpacked", monkeypatch)
    pack(unpacked, tmp_path / "mirror.tar.gz", monkeypatch)
    expected = digest(load("cifar10", unpacked))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        # The server would print a traceback when the client has what it needs and closes the connection first.
        monkeypatch.setattr(server, "handle_error", lambda *_: None)
        url = f"http://127.0.0.1:{server.server_port}/mirror.tar.gz"
        assert digest(load("cifar10", tmp_path / "new" / "data", url)) == expected
        assert capsys.readouterr().err == f"downloading {url}\n", "without a terminal there is no progress bar"
        with pytest.raises(UserError, match=r"can't download .*x \((HTTP Error 404: )?(File )?[Nn]ot [Ff]ound\); put"):
            load("cifar10", tmp_path / "other", f"{url}x")
        server.shutdown()
    assert digest(load("cifar10", tmp_path / "new" / "data")) == expected, "the archive was kept"

    pixels = np.zeros((10, 28, 28))
    mirror = write_fashion_mnist(tmp_path / "mirror", pixels, pixels, packed=True)
    names = [name for name, _ in published.FashionMNIST.resources]
    resources = [(name, hashlib.md5((mirror / name).read_bytes()).hexdigest()) for name in names]
    monkeypatch.setattr(published.FashionMNIST, "resources", resources)
    load("fashion-mnist", tmp_path / "data", mirror.as_uri())
    assert sorted(path.name for path in (tmp_path / "data" / "FashionMNIST" / "raw").iterdir()) == sorted(names)


def test_a_download_with_another_md5_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"content" * 100_000)
    target = tmp_path / "data" / "target.bin"
    with pytest.raises(UserError, match=r"can't download .*source.bin \(the file there has MD5"):
        download(source.as_uri(), target, "0" * 32, "target.bin")
    assert list(tmp_path.iterdir()) == [source]
    download(source.as_uri(), target, hashlib.md5(source.read_bytes()).hexdigest(), "target.bin")
    assert target.read_bytes() == source.read_bytes()


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(url: str, root: Path, filename: str) -> None:
        (root / filename).write_bytes(b"half")
        assert socket.getdefaulttimeout() == 30, "a silent host must not hang the run"
        raise KeyboardInterrupt

    before = socket.getdefaulttimeout()
    monkeypatch.setattr("fastvit_train.data.sources.download.download_url", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", tmp_path)
    assert not list(tmp_path.iterdir()) and socket.getdefaulttimeout() == before


def test_the_progress_bar_is_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = _ProgressBar("http://x/y", sys.stderr)
    bar.write(" 50%")
    bar.write("100%")
    assert capsys.readouterr().err == "downloading http://x/y\n 50%100%"

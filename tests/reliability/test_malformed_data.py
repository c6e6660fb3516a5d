"""Damaged and hostile data sets end in one line and exit status 2; nothing in them runs."""

import contextlib
import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.malformed import (
    MALFORMED,
    NOT_WRITABLE,
    TINY,
    Evil,
    check_examples,
    error_line,
    is_refused,
    mutated,
    some_or_many,
)
from tests.support import write_fashion_mnist
from tests.support.cifar import write_cifar10

Count = Callable[..., None]
NOWHERE = ("--runs-dir", NOT_WRITABLE, "--data-url", "http://127.0.0.1:9", *TINY)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that appears if a hostile pickle is loaded, which must not happen."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


# idx


def write_fashion(root: Path) -> Path:
    """Write Fashion-MNIST's four files with three images each."""
    return write_fashion_mnist(root, np.zeros((3, 28, 28)), np.zeros((3, 28, 28)))


def _header(*shape: int, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape)


GOOD_IDX = _header(3, 28, 28) + bytes(3 * 28 * 28)
IDX = {
    "empty": b"", "one byte": b"\0", "header cut": GOOD_IDX[:9], "cut": GOOD_IDX[:-1], "too long": GOOD_IDX + b"\0",
    "other kind": _header(3, 28, 28, kind=13) + bytes(4 * 3 * 28 * 28), "not idx": b"\x89PNG" + bytes(50),
    "other dimensions": _header(3, 784) + bytes(3 * 784), "255 dimensions": b"\0\0\x08\xff" + b"\xff" * 1020,
    "2**96 bytes": _header(2**32 - 1, 2**32 - 1, 2**32 - 1), "product of 2**64": _header(2**31, 2**31, 4),
    "4 GB": _header(2**32 - 1, 1, 1), "27 x 28": _header(3, 27, 28) + bytes(3 * 27 * 28), "none": _header(0, 28, 28),
    "0 x 28": _header(3, 0, 28), "of another number": _header(2, 28, 28) + bytes(2 * 784),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_idx_files(tmp_path: Path, count: Count, packed: bool) -> None:
    root = write_fashion(tmp_path / "data")
    file = root / "train-images-idx3-ubyte"
    cases = dict(IDX)
    if packed:
        file.unlink()
        file = file.with_suffix(".gz")
        cases = {name: gzip.compress(content) for name, content in IDX.items()}
        good = gzip.compress(GOOD_IDX)
        cases |= {"gz cut": good[:-9], "checksum": good[:-8] + b"\0\0\0\0" + good[-4:], "no gz": GOOD_IDX, "": b""}
        cases |= {"rubbish behind": good + b"rubbish"}
    for name, content in cases.items():
        file.write_bytes(content)
        line = error_line("--dataset", "fashion-mnist", "--data-dir", root, *NOWHERE)
        assert line, name
        count(MALFORMED)


@some_or_many("examples", 30, 150)
def test_idx_files_mutated(tmp_path: Path, count: Count, seed: int, examples: int) -> None:
    root = write_fashion(tmp_path / "data")
    file = root / "t10k-images-idx3-ubyte.gz"
    file.with_suffix("").unlink()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        is_refused(count, "--dataset", "fashion-mnist", "--data-dir", root, *NOWHERE)

    check_examples(mutated(gzip.compress(GOOD_IDX)) | mutated(GOOD_IDX[:40]).map(gzip.compress), examples, seed, check)


# CIFAR


def hostile_batches(marker: Path) -> dict[str, bytes]:
    """Contents that are not a CIFAR batch, by what is wrong with them; the first three create `marker` if loaded."""
    batch = pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]}, protocol=2)
    return {
        "code": pickle.dumps({"data": Evil(marker)}),
        "code in protocol 0": b"cposix\nsystem\n(S'touch " + bytes(marker) + b"'\ntR.",
        "code by name": b"c__builtin__\nexec\n(S'open(\"" + bytes(marker) + b'", "w")\'\ntR.',
        "another batch": batch,
        "cut": batch[:-40],
        "bytes of 2**62": b"}\x8e" + b"\xff" * 7 + b"\x3f.",
        "nested deeply": b"})" + b"\x85" * 300_000 + b"K\x01s.",
        "empty": b"",
        "text": b"hello",
        "zip": b"PK\x03\x04",
    }


def test_the_hostile_pickles_would_run(marker: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    for name in ("code", "code in protocol 0", "code by name"):
        with contextlib.suppress(Exception):
            pickle.loads(hostile_batches(marker)[name])
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_cifar_batches(tmp_path: Path, count: Count, marker: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = write_cifar10(tmp_path / "data", monkeypatch, per_batch=3)
    file = root / "cifar-10-batches-py" / name
    for content in hostile_batches(marker).values():
        file.write_bytes(content)
        line = error_line("--dataset", "cifar10", "--data-dir", root, *NOWHERE)
        assert line and f"{name} is damaged or is a different file" in line
        count(MALFORMED)
    file.unlink()
    os.mkfifo(file)
    assert is_refused(count, "--dataset", "cifar10", "--data-dir", root, *NOWHERE)


@some_or_many("examples", 30, 150)
def test_cifar_batches_mutated(
    tmp_path: Path, count: Count, seed: int, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_cifar10(tmp_path / "data", monkeypatch, per_batch=3)
    file = root / "cifar-10-batches-py" / "test_batch"
    original = file.read_bytes()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        assert is_refused(count, "--dataset", "cifar10", "--data-dir", root, *NOWHERE) == (content != original)

    check_examples(mutated(original), examples, seed, check)


@pytest.mark.slow
def test_archives(tmp_path: Path, count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive with another MD5 is not unpacked, whatever the names of its members are."""
    outside = tmp_path / "outside"
    batches = write_cifar10(tmp_path / "made", monkeypatch, per_batch=3) / "cifar-10-batches-py"
    root = tmp_path / "data"
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
        for name in ("../outside", str(outside), "cifar-10-batches-py/../../outside"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    whole = archive.read_bytes()
    huge = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    huge.size = 1 << 50
    contents = (
        whole,
        whole[:50],
        whole[:-20],
        b"",
        b"hello",
        gzip.compress(bytes(1 << 26)),
        gzip.compress(huge.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)),
    )
    for content in contents:
        archive.write_bytes(content)
        line = error_line("--dataset", "cifar10", "--data-dir", root, *NOWHERE)
        assert line and "cifar-10-python.tar.gz is damaged or is a different file: MD5" in line
        count(MALFORMED)
    assert [path.name for path in root.iterdir()] == [archive.name] and not outside.exists()

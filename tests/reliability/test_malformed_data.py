"""Data sets from elsewhere, as files and archives: damaged or hostile, one line, status 2, and nothing in them runs."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvit_train.data import cifar, idx
from fastvit_train.utils.errors import UserError
from tests.reliability.malformed import MALFORMED, NOT_WRITABLE, TINY, Evil, answer, asked, for_each, mutated
from tests.support import idx_bytes, write_cifar10

Count = Callable[..., None]
A_FEW_OR_MANY = pytest.mark.parametrize("examples", [10, pytest.param(400, marks=pytest.mark.slow)])
NOWHERE = ("--runs-dir", NOT_WRITABLE, "--data-url", "http://127.0.0.1:9", *TINY)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that appears where a pickle is run; it must not."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


# idx


def write_fashion(root: Path) -> Path:
    """Fashion-MNIST's four files, three images each."""
    root.mkdir()
    for part in ("train", "t10k"):
        (root / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((3, 28, 28))))
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(3)))
    return root


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
        line = answer("--dataset", "fashion-mnist", "--data-dir", root, *NOWHERE)
        assert line, name
        count(MALFORMED)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """64 MiB packed into 64 KiB, behind what a header promises and where it promises all of it."""
    path = tmp_path / "it.gz"
    for content in (GOOD_IDX, _header(2**28 + 1, 1, 1)):
        path.write_bytes(gzip.compress(content + bytes(1 << 26)))
        tracemalloc.start()
        with pytest.raises(UserError, match="it.gz"):
            idx.read(path, ndim=3)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


@A_FEW_OR_MANY
def test_idx_files_mutated(tmp_path: Path, count: Count, seed: int, examples: int) -> None:
    root = write_fashion(tmp_path / "data")
    file = root / "t10k-images-idx3-ubyte.gz"
    file.with_suffix("").unlink()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        asked(count, "--dataset", "fashion-mnist", "--data-dir", root, *NOWHERE)

    for_each(mutated(gzip.compress(GOOD_IDX)) | mutated(GOOD_IDX[:40]).map(gzip.compress), examples, seed, check)


# CIFAR


def _batch(**changed: Any) -> bytes:
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]}
    return pickle.dumps({**batch, **changed}, protocol=2)


def _nested(times: int) -> list[Any]:
    labels: list[Any] = [0] * 10
    for _ in range(times):
        labels = [labels] * 10
    return labels


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Batches that are none, by what is wrong with them."""
    forged = (
        b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'x'\nt(dS'x'\n(cnumpy\ndtype\n(S'O8'\ntRI0\ntsI8\nI1\nI0\ntb."
    )
    return {
        "code": pickle.dumps({"data": Evil(marker)}),
        "code in protocol 0": b"cposix\nsystem\n(S'touch " + bytes(marker) + b"'\ntR.",
        "code by name": b"c__builtin__\nexec\n(S'1'\ntR.",
        "builtins of a function": b"\x80\x04\x8c\x12numpy.core.numeric\x8c\x10_frombuffer.func\x93.",
        "a forged type": b"}S'data'\n" + forged[:-1] + b"s.",
        "objects": _batch(data=np.array([[marker]], object)), "floats": _batch(data=np.zeros((3, 3072))),
        "texts": _batch(data=np.zeros((3, 3072), "U1")),
        "labels as objects": _batch(labels=np.array([{}, 1, 2], object)),
        "nested labels": _batch(labels=_nested(12)), "labels nested twice": _batch(labels=[[1, 2, 3]]),
        "too few labels": _batch(labels=[1]), "no labels": _batch(labels=None),
        "labels of 2**70": _batch(labels=[2**70] * 3),
        "labels outside": _batch(labels=[1, 2, 10]), "negative labels": _batch(labels=[-1, 2, 3]),
        "no data": _batch(data=None), "a list of data": _batch(data=[[0] * 3072] * 3),
        "flat": _batch(data=np.zeros(9, np.uint8)),
        "a shape of 2**62": _batch(data=np.zeros((1, 3072), np.uint8)).replace(
            b"K\x01M\0\x0c\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85"
        ),
        "an index of 2**32": b"}r\xff\xff\xff\xff.", "a frame of 2**63": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
        "bytes of 2**62": b"}\x8e" + b"\xff" * 7 + b"\x3f.",
        "a name nested deeply": b"})" + b"\x85" * 300_000 + b"K\x01s.",
        "a list": b"].", "a number": b"K\x01.", "sets": pickle.dumps({"data": {1}}), "two names": b"}K\x01K\x02s.",
        "attributes of a class": b"cnumpy\ndtype\n}S'x'\nK\x01sb.", "persistent": b"P1\n.", "extension": b"\x82\x01.",
        "empty": b"", "text": b"hello", "cut": _batch()[:-40], "no end": _batch()[:-1], "zip": b"PK\x03\x04",
    }  # fmt: skip


def test_cifar_batches(tmp_path: Path, count: Count, marker: Path) -> None:
    root = write_cifar10(tmp_path / "data", per_batch=3)
    file = root / "cifar-10-batches-py" / "data_batch_3"
    for name, content in hostile_pickles(marker).items():
        file.write_bytes(content)
        line = answer("--dataset", "cifar10", "--data-dir", root, *NOWHERE)
        assert line, name
        count(MALFORMED)
    file.unlink()
    os.mkfifo(file)
    assert asked(count, "--dataset", "cifar10", "--data-dir", root, *NOWHERE)


def test_hostile_class_names_become_numbers(tmp_path: Path, marker: Path) -> None:
    root = write_cifar10(tmp_path / "data", per_batch=3)
    meta = root / "cifar-10-batches-py" / "batches.meta"
    for names in ([b"\xff"] * 10, [_nested(9)] * 10, 5, None, [Evil(marker)] * 10, {"a": 1}, "0123456789a"):
        meta.write_bytes(pickle.dumps({"label_names": names}))
        assert cifar.load("cifar10", root, None)[0] == tuple("0123456789")


@A_FEW_OR_MANY
def test_cifar_batches_mutated(tmp_path: Path, count: Count, seed: int, examples: int) -> None:
    root = write_cifar10(tmp_path / "data", per_batch=3)
    file = root / "cifar-10-batches-py" / "test_batch"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        asked(count, "--dataset", "cifar10", "--data-dir", root, *NOWHERE)

    for_each(mutated(file.read_bytes()), examples, seed, check)


def _member(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def test_archives(tmp_path: Path, count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile members do nothing, whether the archive is complete besides or not; the checksum is passed over here."""
    outside = tmp_path / "outside"
    batches = write_cifar10(tmp_path / "made", per_batch=3) / "cifar-10-batches-py"
    root = tmp_path / "data"
    root.mkdir()
    archive = root / "cifar-10-python.tar.gz"
    ask = ("--dataset", "cifar10", "--data-dir", root, *NOWHERE)
    hostile = [
        _member("../outside", size=3), _member(str(outside), size=3),
        _member("cifar-10-batches-py/../../outside", size=3),
        _member("cifar-10-batches-py/test_batch", tarfile.SYMTYPE, linkname="/etc/passwd"),
        _member("cifar-10-batches-py/test_batch", tarfile.LNKTYPE, linkname="../outside"),
        _member("cifar-10-batches-py/test_batch", tarfile.CHRTYPE, devmajor=1, devminor=5),
        _member("cifar-10-batches-py/test_batch", tarfile.FIFOTYPE), _member("cifar-10-batches-py", tarfile.DIRTYPE),
        _member("elsewhere/test_batch", size=3), _member("\x1b[2J\n", size=3), _member("x" * 5000, size=3),
    ]  # fmt: skip

    def write(members: list[tarfile.TarInfo], test_batch: bool) -> None:
        with tarfile.open(archive, "w:gz") as tar:
            for path in sorted(batches.iterdir()):
                if test_batch or path.name != "test_batch":
                    tar.add(path, f"{batches.name}/{path.name}")
            for member in members:
                tar.addfile(member, io.BytesIO(bytes(member.size)))

    write(hostile, test_batch=True)
    assert "is damaged or another file: MD5" in str(answer(*ask))
    monkeypatch.setattr("fastvit_train.data.cifar.check_md5", lambda path, expected: None)
    assert answer(*ask) is None, "what is not asked for does no harm"
    for member in hostile:
        write([member], test_batch=False)
        line = answer(*ask)
        assert line and "test_batch is missing" in line, (member.name, line)
        count(MALFORMED)
    whole = archive.read_bytes()
    for content in (
        b"",
        b"hello",
        whole[:50],
        whole[:-20],
        gzip.compress(b"hello" * 1000),
        gzip.compress(bytes(1 << 26)),
    ):
        archive.write_bytes(content)
        assert asked(count, *ask), content[:20]
    huge = _member("cifar-10-batches-py/data_batch_1", size=1 << 50).tobuf(tarfile.GNU_FORMAT)
    archive.write_bytes(gzip.compress(huge + bytes(10_240)))
    assert asked(count, *ask)
    assert [path.name for path in root.iterdir()] == [archive.name] and not outside.exists()

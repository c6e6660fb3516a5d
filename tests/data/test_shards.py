"""--dataset shards: samples are found in tar files and decoded as files are; mistakes are one line."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import DataConfig
from fastvit_train.data.datasets import DatasetSpec, count_classes, load_dataset
from fastvit_train.data.decode import decode
from fastvit_train.data.encoded import Member
from fastvit_train.data.rendering import Rendering
from fastvit_train.data.sources import shards
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.training.loop import train
from fastvit_train.utils.errors import UserError
from tests.support import launch, one_line_error, rgb
from tests.support.parquet import alternating, png
from tests.support.tars import samples, write, write_tar

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "attention": "fused", "batch_size": 8}


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig(dataset="shards", data_dir=str(root), **settings)


def load(root: Path, **settings: Any) -> DatasetSpec:
    return load_dataset(config(root, **settings), rgb(16), examine_streamed=True)


@pytest.mark.parametrize(
    ("train_shard", "test_shard", "evaluated_on"),
    [
        ("train-0000.tar", "test-0000.tar", "test"),
        ("train/00.tar", "val/00.tar", "val"),
        ("animals1k-Train-0.tar", "animals1k-validation-0.tar", "validation"),
    ],
)
def test_samples_and_splits_are_found(tmp_path: Path, train_shard: str, test_shard: str, evaluated_on: str) -> None:
    root = tmp_path / "animals"
    write_tar(root / train_shard, samples(40))
    write_tar(root / test_shard, samples(10, 100))
    dataset = load(root)
    assert (dataset.name, dataset.classes, dataset.evaluated_on) == ("animals", ("0", "1"), evaluated_on)
    assert dataset.train.labels.tolist() == alternating(40) and dataset.test.labels.tolist() == alternating(10)
    assert count_classes(config(root)) == 2 and dataset.notes == ()


def test_the_files_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    """As tar writes them for `tar cf train-0.tar *.png *.cls`."""
    write_tar(tmp_path / "train-0.tar", sorted(samples(6), key=lambda file: file[0].endswith(".cls")))
    write_tar(tmp_path / "test-0.tar", samples(2, 100))
    dataset = load(tmp_path)
    assert dataset.train.labels.tolist() == alternating(6) and dataset.notes == ()


def test_tar_files_that_were_joined_keep_all_their_samples(tmp_path: Path) -> None:
    """Each counts from 0, and the images of the second are others."""
    second = [(name, content) for (name, _), (_, content) in zip(samples(5), samples(5, 50), strict=True)]
    write_tar(tmp_path / "train-0.tar", samples(6) + second)
    write_tar(tmp_path / "test-0.tar", samples(2, 100))
    train = load(tmp_path).train
    assert train.labels.tolist() == alternating(6) + alternating(5)
    assert len({image.numpy().tobytes() for image in train.pixels(torch.arange(11), rgb(16))}) == 11


@pytest.mark.parametrize("stream", ["never", "always"])
def test_images_are_decoded_as_files_are(tmp_path: Path, stream: str) -> None:
    dataset = load(write(tmp_path / "animals"), stream=stream, fit="pad")
    for sample in (7, 31):  # in the first shard, and in the second
        (tmp_path / "it.png").write_bytes(png(sample))
        expected = decode(tmp_path / "it.png", rgb(16), Rendering(fit="pad"))
        assert torch.equal(dataset.train.pixels(torch.tensor([sample]), rgb(16))[0], expected)


def test_a_member_is_read_as_a_file_of_its_own(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "it.tar", [("a.bin", bytes(range(100))), ("b.bin", b"b" * 1000), ("c.bin", b"c")])
    first = Member(path, 512, 100)
    assert str(first) == f"a.bin in {path}"
    with first.open("rb") as stream:
        assert stream.read(3) == b"\0\1\2" and stream.seek(-2, 2) == 98 and stream.read(10) == b"bc"
        assert stream.seek(200) == 200 and stream.read(1) == b"", "nothing of the next member"


@pytest.mark.slow
def test_a_model_learns_from_shards_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    root, runs = write(tmp_path / "animals"), tmp_path / "runs"
    settings = {"dataset": "shards", "data_dir": str(root), "runs_dir": str(runs), "epochs": 8, "lr": 3e-3, **SMALL}
    summary = train(exp_name="whole", **settings)
    assert summary["dataset"] == "animals" and summary["test_accuracy"] == 1.0 == evaluate(runs / "whole").accuracy
    train(exp_name="streamed", stream="always", stop_after=3, **settings)
    train(exp_name="streamed", stream="always", resume="must", **settings)
    whole, streamed = (load_file(runs / name / "model.safetensors") for name in ("whole", "streamed"))
    assert all(torch.equal(whole[key], streamed[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    flags = ("--dataset", "shards", "--data-dir", write(tmp_path / "animals"), "--epochs", 2, "--batch-size", 8)
    for processes in (1, 2):
        done = launch(*flags, "--runs-dir", tmp_path, "--exp-name", processes, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "12")
    assert one["test_loss"] == pytest.approx(two["test_loss"], abs=1e-5)


def test_the_headers_are_read_again_only_if_a_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "animals")
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_scan", None)
        assert torch.equal(load(root).train.labels, first.train.labels)
    write_tar(root / "train-0001.tar", samples(15, 24))
    assert len(load(root).train.labels) == 39


def test_labels_are_numbers_or_texts_and_names_come_from_a_file(tmp_path: Path) -> None:
    def labels(root: Path, *texts: str) -> tuple[tuple[str, ...], list[int]]:
        files = [(f"{i}.{name}", content) for i, text in enumerate(texts) for name, content in described(text, i)]
        write_tar(root / "train-0.tar", files)
        write_tar(root / "test-0.tar", files)
        dataset = load(root)
        return dataset.classes, dataset.train.labels.tolist()

    def described(text: str, i: int) -> list[tuple[str, bytes]]:
        entry = ("cls", text.encode()) if i % 2 else ("json", json.dumps({"label": text, "caption": "no"}).encode())
        return [("seg.png", b"not this image"), ("png", png(i)), entry, ("txt", b"a caption")]

    assert labels(tmp_path / "texts", "dog", "cat", "dog") == (("cat", "dog"), [1, 0, 1])
    assert labels(tmp_path / "numbers", "10", "002", "2") == (("2", "10"), [1, 0, 0])
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "classnames.txt").write_text("ant\nbee\ncat\n")
    assert labels(tmp_path / "named", "2", "0", "1") == (("ant", "bee", "cat"), [2, 0, 1])
    with pytest.raises(UserError, match=r"classnames.txt names 3 classes, counted from 0, but an image has class 3"):
        labels(tmp_path / "named", "3", "0")
    (tmp_path / "named" / "classnames.txt").write_text("\ufeffant\n\ncat\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"classnames.txt has no name in line 2"):
        labels(tmp_path / "named", "2", "0")


@pytest.mark.parametrize(
    ("described", "label"),
    [
        ('{"label": null, "class": " dog "}', "dog"),
        ('{"target": 3, "label": 4}', "4"),
        ('{"label": true}', ""),
        ('{"label": [1]}', ""),
        ("[1]", ""),
        ("no JSON", ""),
        ("[" * 100_000, ""),
    ],
    ids=range(7),
)
def test_the_class_in_a_json_file(tmp_path: Path, described: str, label: str) -> None:
    shard = write_tar(tmp_path / "it.tar", [("a.png", png(0)), ("a.json", described.encode())])
    (sample,) = shards._scan(shard)
    assert sample.label == label and sample.size == len(png(0))


def test_linked_folders_are_read_once_and_what_is_not_used_is_counted(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere")
    root = tmp_path / "animals"
    root.mkdir()
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    write_tar(root / "others.tar", samples(2))
    write_tar(root / "val-0.tar", samples(2))
    dataset = load(root)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (40, 10)
    assert dataset.notes == ("2 .tar files passed over: not of the splits train and test",)


def test_a_shard_that_is_removed_or_cut_short_meanwhile_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "animals")
    dataset = load(root, stream="always")
    truncate(root / "train-0001.tar", 700)
    (root / "train-0000.tar").unlink()
    for sample, message in ((7, "train-0000.tar does not exist"), (30, "train-0001.tar can't be decoded")):
        with pytest.raises(UserError, match=rf"the image at byte [0-9,]+ of .*{message}"):
            dataset.train.pixels(torch.tensor([sample]), rgb(16))


def test_samples_without_image_or_class_are_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "animals")
    others = [("a.png", png(0)), ("b.cls", b"1"), ("c.png", png(1)), ("c.cls", b"-1"), ("._d.png", b"")]
    write_tar(root / "train-0002.tar", [*others, *samples(2, 60)])
    dataset = load(root)
    assert len(dataset.train.labels) == 42
    assert dataset.notes == ("3 samples without an image or without a class passed over",)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    second = 512 + -(-len(png(0)) // 512) * 512
    content[second : second + 300] = b"\xff" * 300
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root), "is not a folder; expected .*train-0000.tar and .*test-0000.tar"),
        (lambda root: [path.unlink() for path in root.iterdir()], "has no .tar files; expected"),
        (lambda root: (root / "test-0000.tar").unlink(), "no .tar files with test, val, validation or valid in their"),
        (lambda root: [path.unlink() for path in root.glob("train*")], "has no .tar files with train in their names"),
        (
            lambda root: truncate(root / "train-0001.tar", 3000),
            "train-0001.tar can't be read as a tar file .* fetch it",
        ),
        (lambda root: truncate(root / "train-0001.tar", 600), "train-0001.tar can't be read as a tar file"),
        (lambda root: damage_header(root / "train-0000.tar"), "train-0000.tar can't .*a damaged header at byte"),
        (lambda root: (root / "train-0000.tar").write_bytes(gzip.compress(b"x")), "can't be read as a tar file"),
        (lambda root: write_tar(root / "test-0000.tar", [("a.txt", b"")]), "no sample with an image and a class"),
        (lambda root: write_tar(root / "test-0000.tar", [("a.png", png(0)), ("a.cls", b"9")]), "has the class '9'"),
        (
            lambda root: write_tar(root / "test-0000.tar", [("a/b.png", b"no image"), ("a/b.cls", b"0")]),
            r"a/b.png in .*test-0000.tar can't be decoded \(it is not a BMP",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, break_it: Any, message: str) -> None:
    break_it(root := write(tmp_path / "animals"))
    with pytest.raises(UserError, match=message):
        load(root)


@pytest.mark.slow
def test_compressed_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-0000.tar.gz").write_bytes(gzip.compress(b"x"))
    done = launch("--dataset", "shards", "--data-dir", tmp_path, "--runs-dir", tmp_path / "runs")
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert "train-0000.tar.gz is compressed: decompress it" in one_line_error(done.stderr)


def test_a_part_is_held_out_of_shards_without_a_split(tmp_path: Path) -> None:
    write_tar(tmp_path / "00.tar", samples(40))
    dataset = load(tmp_path, holdout=0.2)
    assert (len(dataset.train.labels), len(dataset.test.labels), dataset.evaluated_on) == (32, 8, "holdout")

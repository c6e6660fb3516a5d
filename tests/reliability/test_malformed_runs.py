"""Damaged and hostile weights, checkpoints and runs end in one line and exit status 2; no code in them runs."""

import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.cli.main import main
from fastvit_train.utils import atomic_io
from tests.reliability.malformed import NOT_WRITABLE, TINY, Evil, check_examples, is_refused, mutated, some_or_many

Count = Callable[..., None]
A_FEW_OR_MANY = pytest.mark.parametrize("examples", [10, pytest.param(150, marks=pytest.mark.soak)])
NOWHERE = ("--runs-dir", NOT_WRITABLE, *TINY)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that appears if a hostile pickle is loaded, which must not happen."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of one epoch, which tests copy and damage."""
    runs = tmp_path_factory.mktemp("finished")
    main(["--runs-dir", str(runs), "--exp-name", "run", *TINY])
    return runs / "run"


def hostile_weights(marker: Path) -> dict[str, Any]:
    """Objects that torch.save accepts and that are not a state dict, by what is wrong with them."""
    return {
        "code": {"x": Evil(marker)}, "code in a list": [Evil(marker)], "code as the name": {Evil: 1}, "list": [1],
        "code in a wrapping": {"state_dict": {"x": torch.zeros(1)}, "args": Evil(marker)}, "none": None, "text": "x",
        "a path": {"x": marker}, "wraps none": {"state_dict": None}, "wraps a number": {"model": 5},
        "a number": {"a": 1},
        "wraps itself": {"model_state_dict": {"model_state_dict": 1}}, "numbers for names": {3: torch.zeros(1)},
        "nothing": {}, "a head without shape": {"head.weight": torch.tensor(1.0)},
        "a sparse head": {"head.weight": torch.eye(3).to_sparse()},
        "heads that differ": {
            f"encoder.blocks.0.attention.heads.{i}.query.weight": torch.zeros(i + 1, i + 1) for i in (0, 1)
        },
        "no such layer": {"encoder.blocks.0.x": torch.zeros(1)},
        "positions in whole numbers": {"pos_embed": torch.zeros(1, 9, 8).int()},
        "positions without shape": {"pos_embed": torch.tensor(1.0)},
        "compact": {"classifier.blocks.0.x": torch.zeros(1)},
        "complex": {"head.weight": torch.zeros(10, 8, dtype=torch.complex64)}, "an escape": {"\x1b[2J": torch.zeros(1)},
        "a huge view": {"head.weight": torch.zeros(1).expand(1 << 40)},
    }  # fmt: skip


@pytest.mark.slow
def test_weights(tmp_path: Path, count: Count, marker: Path) -> None:
    file = tmp_path / "it.pth"
    for name, content in hostile_weights(marker).items():
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            assert is_refused(count, *NOWHERE, "--weights", file), (name, zipped)
    contents = {"empty": b"", "text": b"hello", "zip": b"PK\x03\x04", "pickle": pickle.dumps(Evil(marker)), "end": b"."}
    for content in contents.values():
        file.write_bytes(content)
        assert is_refused(count, *NOWHERE, "--weights", file), content


@pytest.mark.slow
def test_safetensors(tmp_path: Path, count: Count, marker: Path) -> None:
    file = tmp_path / "it.safetensors"
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = [
        {"x": tensor}, {"x": {**tensor, "shape": [2**62]}}, {"x": {**tensor, "data_offsets": [0, 2**62]}}, {"x": []},
        {"x": {**tensor, "data_offsets": [4, 0]}}, {"x": {**tensor, "dtype": "O"}}, {"x": tensor, "y": tensor}, [], 5,
        {"__metadata__": 5}, {"\x1b[2J": tensor},
    ]  # fmt: skip
    packed = [json.dumps(header).encode() for header in headers]
    contents = [struct.pack("<Q", len(header)) + header + bytes(4) for header in packed]
    contents += [b"", b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 60_000) + b"[" * 60_000, b"\x80\x04N."]
    for content in [*contents, pickle.dumps(Evil(marker))]:
        file.write_bytes(content)
        assert is_refused(count, *NOWHERE, "--weights", file), content[:50]


@some_or_many("examples", 30, 150)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_mutated(finished: Path, tmp_path: Path, count: Count, seed: int, suffix: str, examples: int) -> None:
    file = tmp_path / f"it{suffix}"
    if suffix == ".pth":
        torch.save(load_file(finished / "model.safetensors"), file)
    else:
        shutil.copy(finished / "model.safetensors", file)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        is_refused(count, *NOWHERE, "--weights", file)

    check_examples(mutated(file.read_bytes()), examples, seed, check)


# Runs


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "run", symlinks=True))


DEEP = b"[" * 100_000
CONFIGS = [
    b"",
    b"- 1",
    b"a: b",
    b"epochs: x",
    DEEP,
    b"\x80",
    b"model: nope",
    b"dataset: cifar10\ndata_url: http://127.0.0.1:9",
]
MODEL_CONFIGS = [
    b"",
    b"[]",
    b"5",
    b'{"label_names": 5}',
    b'{"label_names": ["\\u001b[2J"]}',
    DEEP,
    b"\x80",
    b'{"a":' * 9999,
]
SUMMARIES = [b"", b"[]", b"5", b"{}", b"null", DEEP, b"\x80", b'{"model": ' * 9999, b"x" * (1 << 25)]
FIGURES = [None, [], {}, "x", True, [[0] * 50], "9" * 10]


@pytest.mark.slow
def test_runs(copy: Path, tmp_path: Path, count: Count) -> None:
    evaluate, compare = ("eval", copy), ("compare", copy, "--output", f"{NOT_WRITABLE}/x.png")
    garbled: list[tuple[str, list[bytes], tuple[object, ...]]] = [
        ("config.yaml", CONFIGS, evaluate), ("config.json", MODEL_CONFIGS, evaluate),
        ("model.safetensors", [b"", b"x", pickle.dumps(Evil(tmp_path / "ran"))], evaluate),
        ("summary.json", SUMMARIES, compare), ("metrics.jsonl", [*SUMMARIES, b"{}\n{}"], compare),
    ]  # fmt: skip
    for name, contents, command in garbled:
        path = copy / name
        whole = path.read_bytes()
        for content in contents:
            path.write_bytes(content)
            assert is_refused(count, *command), (name, content[:50])
        path.unlink()
        assert is_refused(count, *command), f"no {name}"
        os.mkfifo(path)
        assert is_refused(count, *command), f"{name} is a pipe"
        path.unlink()
        path.write_bytes(whole)
    assert not (tmp_path / "ran").exists()


@some_or_many("some", 60, 300)
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_summary_values_of_another_type(copy: Path, count: Count, seed: int, name: str, some: int) -> None:
    whole = json.loads((copy / name).read_text())
    changes = [(key, value) for key in whole for value in FIGURES]
    for key, value in random.Random(seed).sample(changes, min(some, len(changes))):
        (copy / name).write_text(json.dumps({**whole, key: value}))
        is_refused(count, "compare", copy, "--output", f"{NOT_WRITABLE}/x.png")


@pytest.mark.parametrize("markdown", [False, True])
def test_texts_of_a_summary_are_shown_literally(
    copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, markdown: bool
) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    texts = {"model": "[/bold]", "dataset": "\x1b[2J", "recipe": "[link=x]$\\frac", "device": "\r\n" + "x" * 10**6}
    (copy / "summary.json").write_text(json.dumps({**summary, **texts}))
    main(["compare", str(copy), "--output", str(tmp_path / "x.png"), *["--markdown"] * markdown])
    shown = capsys.readouterr().out
    if markdown:
        shown = re.sub(r"\\([\[\]])", r"\1", shown)
    assert "\x1b" not in shown and "[/bold]" in shown and "[link=x]" in shown and len(shown) < 10_000


@A_FEW_OR_MANY
@pytest.mark.parametrize("name", ["config.yaml", "config.json", "model.safetensors", "summary.json", "metrics.jsonl"])
def test_runs_mutated(copy: Path, count: Count, seed: int, name: str, examples: int) -> None:
    file = copy / name
    compare = ("compare", copy, "--output", f"{NOT_WRITABLE}/x.png")

    def check(content: bytes) -> None:
        file.write_bytes(content)
        is_refused(count, *(compare if name in ("summary.json", "metrics.jsonl") else ("eval", copy)))

    check_examples(mutated(file.read_bytes()), examples, seed, check)


# Checkpoints


def resume(run: Path) -> tuple[object, ...]:
    return ("--runs-dir", run.parent, "--exp-name", run.name, *TINY, "--resume", "must")


@pytest.mark.slow
def test_hostile_checkpoints(copy: Path, count: Count, marker: Path) -> None:
    last = (copy / "checkpoints" / "last").resolve()
    before = shutil.copytree(last, copy.parent / "before")
    for name in sorted(path.name for path in last.iterdir() if path.name != atomic_io.CHECKSUMS):
        for evil in (pickle.dumps(Evil(marker)), None):
            if evil is None:
                torch.save({"x": Evil(marker)}, last / name)
            else:
                (last / name).write_bytes(evil)
            atomic_io.write_checksums(last)
            # A damaged random state is noticed by its fingerprint, which here may be the same without it.
            assert is_refused(count, *resume(copy)) or name.startswith("random_states"), name
            shutil.rmtree(last)
            shutil.copytree(before, last)
    (last / "model.safetensors").unlink()
    for planted in ("pytorch_model.bin", "model.safetensors.index.json", "custom_checkpoint_0.pkl"):
        torch.save({"x": Evil(marker)}, last / planted)
        atomic_io.write_checksums(last)
        assert is_refused(count, *resume(copy)), planted


@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
@some_or_many("examples", 30, 150)
def test_checkpoints_mutated(copy: Path, count: Count, seed: int, forged: bool, examples: int) -> None:
    last = (copy / "checkpoints" / "last").resolve()
    before = shutil.copytree(copy, copy.parent / "before", symlinks=True)
    for name in sorted(path.name for path in last.iterdir()):
        whole = (last / name).read_bytes()

        def check(content: bytes, name: str = name) -> None:
            (last / name).write_bytes(content)
            if forged:
                atomic_io.write_checksums(last)
            is_refused(count, *resume(copy))
            shutil.rmtree(copy)
            shutil.copytree(before, copy, symlinks=True)

        check_examples(mutated(whole), max(1, examples // 10), seed, check)

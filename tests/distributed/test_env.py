"""Environment variables that others set are never trusted to be valid."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastvit_train.cli.main import main
from fastvit_train.distributed import cpu_threads, env
from tests.support import run

NOTEBOOK = "module://matplotlib_inline.backend_inline"
SPOILT = {
    "RANK": "first", "WORLD_SIZE": "", "LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "0", "OMP_NUM_THREADS": "0",
    "MKL_NUM_THREADS": "many", "MASTER_PORT": "tcp://10.0.0.1:29500", "TORCHELASTIC_RESTART_COUNT": "x", "PMI_SIZE": "",
    "ACCELERATE_MIXED_PRECISION": "", "ACCELERATE_DYNAMO_BACKEND": "", "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": NOTEBOOK,
}  # fmt: skip
KEPT = ("CUDA_VISIBLE_DEVICES",)
"""an empty value means something there"""


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SPOILT.items():
        monkeypatch.setenv(name, value)
    yield
    assert {name: os.environ.get(name) for name in SPOILT} == SPOILT


def test_what_cannot_be_valid_is_hidden_and_comes_back(spoilt: None, caplog: pytest.LogCaptureFixture) -> None:
    with env.only_valid():
        assert [name for name in SPOILT if name in os.environ] == [*KEPT]
    said = [record.getMessage() for record in caplog.records]
    assert "RANK=first in the environment is not a number that RANK can have: ignored" in said and len(said) == 6


def test_each_reader_takes_it_as_unset(spoilt: None) -> None:
    assert env.is_rank0() and env.launched_world_size() == env.local_world_size() == 1
    assert not env.has_thread_count() and env.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"


def test_what_is_valid_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3", "SIZE": "large"}
    for name, value in valid.items():
        monkeypatch.setenv(name, value)
    with env.only_valid():
        assert {name: os.environ[name] for name in valid} == valid
    assert not env.is_rank0() and env.launched_world_size() == 2 and cpu_threads._user_set_threads()


def test_openmps_list_becomes_its_first_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    with env.only_valid():
        assert os.environ["OMP_NUM_THREADS"] == "4"
    assert os.environ["OMP_NUM_THREADS"] == "4,2"


def test_a_rank_without_a_world_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert env.is_rank0()


@pytest.mark.slow
def test_training_and_evaluation_work(spoilt: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--embed-dim", "8", "--depth", "1", "--num-heads", "1", "--attention", "fused", "--epochs", "1"]
    main([*small, "--runs-dir", str(tmp_path), "--exp-name", "run"])
    main(["eval", str(tmp_path / "run")])
    assert "digits accuracy" in capsys.readouterr().out
    assert (tmp_path / "run" / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "used"),
    [
        (NOTEBOOK, NOTEBOOK if find_spec("matplotlib_inline") else "agg"),
        ("no such backend", "agg"),
        ("agg", "agg"),
        ("svg", "svg"),
    ],
)
def test_matplotlib_can_be_imported_and_keeps_a_valid_backend(backend: str, used: str) -> None:
    code = "import fastvit_train; fastvit_train.train; import matplotlib; print(matplotlib.get_backend())"
    done = run([sys.executable, "-c", code], MPLBACKEND=backend)
    assert done.returncode == 0 and done.stdout.strip().lower() == used, done.stderr

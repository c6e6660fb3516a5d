"""Shared by the tests: printed seeds, small data sets on disk, processes as users start them."""

import os
import pickle
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything of ours is imported, or timm

import timm
from timm.models._hub import save_for_hf

from fastvit_train.config import TrainConfig, override
from fastvit_train.recipes import recipe
from fastvit_train.train import fit

ROOT = Path(__file__).parents[1]
ON_CPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""for several processes: a machine with a GPU may have no second one"""
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
COUNTS: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("reliability")
        for what, number in COUNTS.items():
            terminalreporter.line(f"{what}: {number}")


@pytest.fixture(scope="session")
def count() -> Callable[..., None]:
    """`count(what, number=1)` adds to a line at the end of pytest's output."""

    def add(what: str, number: int = 1) -> None:
        COUNTS[what] += number

    return add


@pytest.fixture
def seed() -> int:
    """A fresh seed for random draws, shown when the test fails; torch is seeded with it."""
    value = int(os.environ.get("FASTVIT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FASTVIT_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: in its interpreter where there is no GPU, on the GPU where there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter and a GPU don't go together in a process")
    return request.param


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """The quickstart recipe, three short epochs of a tiny model, with settings replaced."""

    def config(**settings: object) -> TrainConfig:
        small = {
            "runs_dir": str(tmp_path / "runs"),
            "epochs": 3,
            "batch_size": 240,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "exp_name": "run",
            "attention": "fused",  # auto measures for seconds
        }
        return override(recipe("quickstart"), {**small, **settings}, "the test")

    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small mc-ViT trained on the digits for long enough to know most of them; to be read only."""
    settings = {"epochs": 6, "batch_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "attention": "fused"}
    runs = tmp_path_factory.mktemp("trained")
    fit(override(recipe("quickstart"), {**settings, "runs_dir": str(runs), "exp_name": "run"}, "the test"))
    return runs / "run"


@pytest.fixture(scope="session")
def timms(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a folder as timm writes one, without a trace of the run."""
    folder = tmp_path_factory.mktemp("timms") / "model"
    save_for_hf(timm.create_model(f"local-dir:{trained}", pretrained=True), folder, safe_serialization=True)
    return folder


def launch(
    *args: object, processes: int = 1, before: Sequence[object] = (), cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch BEFORE -m fastvit_train ARGS` as a user would, in a process of its own."""
    on_cpus = ON_CPUS if processes > 1 else {}
    return run(launch_command(*args, processes=processes, before=before), cwd, **on_cpus, **env)


def launch_command(*args: object, processes: int = 1, before: Sequence[object] = ()) -> list[str]:
    """`accelerate launch BEFORE -m fastvit_train ARGS`."""
    multi = ["--multi_gpu", "--num_processes", processes] if processes > 1 else []
    return [*map(str, (*ACCELERATE, "launch", *multi, *before, "-m", "fastvit_train", *args))]


def run(command: list[str], cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the thread settings that pytest may have been started with, and the interpreter's."""
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=900)


def environment(**env: str) -> dict[str, str]:
    """This process's environment as a user's would be, and `env`."""
    ours = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET")
    return {**{key: value for key, value in os.environ.items() if key not in ours}, **env}


def one_line_error(text: str) -> str:
    """The message of the one line that a user's mistake is answered with; fails on a traceback of ours."""
    lines = re.findall(r"^fastvit_train: error: (.*)$", text, re.MULTILINE)
    assert len(lines) == 1, text
    return lines[0]


def write_folder(
    root: Path, per_class: int = 12, classes: tuple[str, ...] = ("circle", "square"), size: int = 32
) -> Path:
    """A folder of images that a model can learn: one colour per class, with noise."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 100, (size, size, 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def write_cifar10(root: Path, per_batch: int = 20, labels: int = 10) -> Path:
    """Batches in torchvision's layout, as the original archive holds them."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        batch = {b"data": data, b"labels": [i % labels for i in range(per_batch)], b"filenames": [b"x.png"] * per_batch}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [f"class {i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` in the idx format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()

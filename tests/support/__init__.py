"""Shared by the tests: processes as users start them, small data sets on disk."""

import gzip
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastvit_train.config.resolved import InputSize

ROOT = Path(__file__).parents[2]
ON_CPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""for several processes: a machine with a GPU may have no second one"""
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]


def rgb(side: int) -> InputSize:
    """The size of a square input in red, green and blue."""
    return InputSize(3, side, side)


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
    """Run a command in `environment`; fail after a quarter of an hour."""
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=900)


def environment(**env: str) -> dict[str, str]:
    """This process's environment as a user's would be, and `env`."""
    ours = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "PYTEST_")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(ours)}, **env}


def write_program(path: Path, script: str) -> Path:
    """Write a shell script that can be started as a program."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for `condition`; fail after `seconds`, which is far more than a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


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


def write_fashion_mnist(folder: Path, train: np.ndarray, test: np.ndarray, packed: bool = False) -> Path:
    """Write images (samples, 28, 28) as Fashion-MNIST's idx files, labels counted 0 to 9; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(len(images)) % 10)):
            content = idx_bytes(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` in the idx format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()

"""The Triton kernels compile ahead of time to machine code, without a GPU, within the limits of each chip."""

import json
import subprocess
import sys
from typing import Any

import pytest

from fastvit_kernels.resources import SHAPES
from tests.support import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    # A separate process, because in this one the kernels are defined for the interpreter.
    done: subprocess.CompletedProcess[str] = run([sys.executable, "-m", "fastvit_kernels.resources", "--json"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_shape_compiles_for_every_chip_in_every_dtype(rows: list[dict[str, Any]]) -> None:
    for chip, limit in {75: 64, 80: 256, 86: 128, 89: 128, 90: 256, 120: 128}.items():
        shapes = {shape for shape, (tokens, _, _) in SHAPES.items() if tokens <= limit}
        dtypes = ("fp32", "fp16") if chip == 75 else ("fp32", "bf16", "fp16")
        seen = {(row["shape"], row["dtype"]) for row in rows if row["capability"] == chip}
        assert seen == {(shape, dtype) for shape in shapes for dtype in dtypes}


def test_shared_memory_is_within_the_limit_of_each_chip(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if not 0 < row["shared"] <= row["shared_limit"]]


def test_low_precision_runs_on_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["dtype"] != "fp32" and row["capability"] >= 80]
    assert not [row for row in rows if not row["tensor_core_instructions"]]


def test_spilled_registers(rows: list[dict[str, Any]]) -> None:
    """The default model spills next to nothing in low precision, and the others a bounded number of bytes."""
    for row in rows:
        print({key: row[key] for key in ("shape", "kernel", "dtype", "capability", "dropout", "registers", "spilled")})
    low = [row for row in rows if row["dtype"] != "fp32" and row["capability"] >= 80]
    assert not [row for row in low if row["shape"] == "mc_vit_4_4_32" and not row["dropout"] and row["spilled"] > 64]
    assert max(row["spilled"] for row in low) <= 640  # 608 by Triton 3.8: two heads of 32 on sm_80

"""In several processes too, the step that a GPU records is that of the loop."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import ACCELERATE, ON_CPUS, ROOT, run

TINY = {"batch_size": 240, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "attention": "fused"}
ADAMW = {"optimizer": "adamw", "crop": "resized", "cutout": 2, "clip_grad": 0.1, "drop_rate": 0.1, "ema": 0.9}
NMUON = {"optimizer": "nmuon", "crop": "shift", "flip": "alternating", "label_smoothing": 0.1}
DEVICES = {"multi_cpu.yaml": ON_CPUS, "multi_gpu.yaml": {"NULLCUDA_NDEV": "2"}}


def in_two_processes(
    case: str, runs_dir: Path, precision: str = "no", file: str = "multi_cpu.yaml", **settings: Any
) -> dict[str, Any]:
    """Run a case of `recorded_steps.py`; returns what it found."""
    flags = ["--config_file", str(ROOT / "accelerate_configs" / file), "--main_process_port", "0"]
    script = [str(Path(__file__).with_name("recorded_steps.py")), case]
    settings = {**TINY, "epochs": 2, "runs_dir": str(runs_dir), **settings}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [*ACCELERATE, "launch", *flags, "--mixed_precision", precision, *script, json.dumps(settings)]
    done = run(command, PYTHONPATH=paths, OMP_NUM_THREADS="1", **DEVICES[file])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_epoch(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["correct"] == expected["correct"]
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert found["spread"] == 0, "the ranks' weights differ"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "settings"), [("no", ADAMW), ("bf16", NMUON)], ids=["adamw", "nmuon"])
def test_in_two_processes_the_recorded_function_is_the_step_of_the_loop_with_ddp(
    tmp_path: Path, precision: str, settings: dict[str, Any]
) -> None:
    result = in_two_processes("compare", tmp_path, precision, **settings)
    for found, expected in zip(result["found"], result["expected"], strict=True):
        assert_same_epoch(found, expected)


@pytest.mark.slow
def test_no_rank_waits_for_one_that_failed_to_record(tmp_path: Path) -> None:
    result = in_two_processes("fail_on_one_rank", tmp_path, **ADAMW)
    assert result["outcomes"] == [[True, "no memory", 1]] * 2
    assert_same_epoch(result["found"], result["expected"])


@pytest.mark.slow
@pytest.mark.nullgpu
@pytest.mark.parametrize("settings", [{}, {"ema": 0.99, "clip_grad": 1.0}], ids=["plain", "ema and clipping"])
def test_a_step_of_each_process_is_one_launch_with_the_exchange_in_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """NCCL's stand-in is called while the graph is recorded, and does not appear among its nodes."""
    settings = {"embed_dim": 48, "depth": 4, "patch_size": 4, "attention": "triton", "compile": True, **settings}
    found = in_two_processes("count_launches", tmp_path, "bf16", "multi_gpu.yaml", **{**NMUON, **settings})
    print(found)
    assert found["recorded"] and found["sums"] == 4  # three calls before the recording, and one in it
    assert found["graphs"] == 5
    assert found["launches"] == found["synchronisations"] == found["violations"] == 0
    assert settings.get("ema") or found["nodes"] <= 2 * 240  # one recording is a trial without the exchange

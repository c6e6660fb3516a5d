"""One process or many, whole or sharded, on one machine or two: the same training."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.parallelize import check_checkpoint, ddp_settings, why_ddp_is_needed
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.support import ACCELERATE, ON_CPUS, ROOT, run

CONFIGS = ROOT / "accelerate_configs"
SmallConfig = Callable[..., TrainConfig]
TINY = {"batch_size": 240, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "attention": "fused"}
"""what small_config has"""
ONE_FILE_OR_BOTH = pytest.mark.parametrize(
    "file",
    [
        pytest.param("fsdp2.yaml", marks=pytest.mark.slow),
        pytest.param("multi_gpu.yaml", marks=pytest.mark.soak),
    ],
)
AUGMENTED = {"crop": "shift", "shift": 2, "cutout": 4, "flip": "random", "epochs": 3}
MIXED = {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "rand", "color_jitter": 0.3, "random_erasing": 0.5}
MIXED |= {"sampler": "balanced", "class_weights": "auto", "label_smoothing": 0.1, "ema": 0.9}


def train_in_several(file: str, processes: int, *runs: dict[str, Any], precision: str = "no") -> list[int]:
    """Train `runs` one after the other in one launch with a file of ours; returns how many buckets each summed."""
    flags = ["--config_file", str(CONFIGS / file), "--num_processes", str(processes), "--mixed_precision", precision]
    listed = json.dumps([{**TINY, **AUGMENTED, **settings} for settings in runs])
    script = str(Path(__file__).with_name("many_runs.py"))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = run([*ACCELERATE, "launch", *flags, "--main_process_port", "0", script, listed], PYTHONPATH=paths, **ON_CPUS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"world size {processes}" in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run_folder / "steps.jsonl")]


def assert_same_run(ours: Path, reference: Path, steps: int) -> None:
    """The loss of every step to 1e-5, the evaluation to the sample."""
    assert len(losses(ours)) == steps and losses(ours) == pytest.approx(losses(reference), abs=1e-5)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (reference, ours))
    assert one["evaluated_images"] == other["evaluated_images"] == 359  # no process gets as many as any other
    assert one["test_accuracy"] == other["test_accuracy"]
    assert other["test_loss"] == pytest.approx(one["test_loss"], abs=1e-5)
    assert other["parameters"] == one["parameters"] and other["model_size_mb"] == one["model_size_mb"]


@pytest.mark.slow
def test_two_processes_and_accumulated_batches_are_one_run_and_sum_gradients_once_per_step(
    small_config: SmallConfig, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    fit(small_config(exp_name="alone", stop_after=1, **AUGMENTED))
    common = {"runs_dir": str(runs), "stop_after": 1}
    variants = [
        {"exp_name": "x2", "grad_accum": 2},
        {"exp_name": "x1"},
        {"exp_name": "x1", "stop_after": 2, "resume": "must"},
        {"exp_name": "mixed", "grad_accum": 2, **MIXED},
        {"exp_name": "averaged", "epochs": 2, "average_last": 2, "stop_after": None},
        {"exp_name": "patient", "lr": 0.0, "patience": 1, "stop_after": None},
    ]
    counts = train_in_several("multi_cpu.yaml", 2, *({**common, **variant} for variant in variants))
    assert counts == [5, 5, 5, 5, 10, 10]
    fit(small_config(exp_name="averaged alone", **{**AUGMENTED, "epochs": 2, "average_last": 2}))
    assert_same_run(runs / "averaged", runs / "averaged alone", steps=10)
    patient = json.loads((runs / "patient" / "summary.json").read_text())
    assert patient["final_weights"] == "best epoch" and patient["epochs"] == 2
    fit(small_config(exp_name="mixed alone", stop_after=1, **{**AUGMENTED, **MIXED}))
    assert_same_run(runs / "mixed", runs / "mixed alone", steps=5)
    assert_same_run(runs / "x2", runs / "alone", steps=5)
    fit(small_config(exp_name="alone", stop_after=2, **AUGMENTED), resume="must")
    assert_same_run(runs / "x1", runs / "alone", steps=10)
    states = [torch.load(runs / f"x2/checkpoints/last/random_states_{n}.pkl", weights_only=False) for n in (0, 1)]
    assert not torch.equal(*(state["torch_manual_seed"] for state in states)), "both ranks drop the same"


@pytest.mark.slow
def test_accumulated_and_large_gradients_are_summed_once_per_step(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(exp_name="alone", stop_after=1, **AUGMENTED))
    common = {"runs_dir": str(tmp_path / "runs"), "stop_after": 1}
    wide = {"exp_name": "wide", "embed_dim": 128, "depth": 4}  # 3 MiB, which torch would sum in two parts
    assert train_in_several("multi_cpu.yaml", 2, {**common, "exp_name": "x4", "grad_accum": 4}, {**common, **wide}) == [
        5,
        5,
    ]
    assert_same_run(tmp_path / "runs" / "x4", tmp_path / "runs" / "alone", steps=5)


@pytest.mark.slow
def test_four_processes_are_one_run(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(exp_name="alone", stop_after=1, **AUGMENTED))
    four = {"runs_dir": str(tmp_path / "runs"), "stop_after": 1}
    runs = [{**four, "exp_name": "four"}, {**four, "exp_name": "x3", "grad_accum": 3}]
    assert train_in_several("multi_gpu.yaml", 4, *runs) == [5, 5]
    for name in ("four", "x3"):
        assert_same_run(tmp_path / "runs" / name, tmp_path / "runs" / "alone", steps=5)


@pytest.mark.parametrize(
    ("file", "sums"),
    [
        pytest.param("multi_gpu.yaml", 6, marks=pytest.mark.slow),
        pytest.param("fsdp2.yaml", 0, marks=pytest.mark.soak),
    ],
)
def test_compiled_in_two_processes_is_the_same_run(
    small_config: SmallConfig, tmp_path: Path, file: str, sums: int
) -> None:
    """DDP sums once more in the first passes, which compile."""
    fit(small_config(exp_name="alone", stop_after=1, depth=1, **AUGMENTED))
    common = {"runs_dir": str(tmp_path / "runs"), "stop_after": 1, "depth": 1, "compile": True}
    runs = [{**common, "exp_name": "compiled"}, {**common, "exp_name": "x4", "grad_accum": 4}]
    assert train_in_several(file, 2, *runs) == [sums, sums]
    for name in ("compiled", "x4"):
        assert_same_run(tmp_path / "runs" / name, tmp_path / "runs" / "alone", steps=5)


@pytest.mark.parametrize(
    "optimizer", [pytest.param("nmuon", marks=pytest.mark.slow), pytest.param("adamw", marks=pytest.mark.soak)]
)
def test_sharded_is_the_run_of_one_process_and_goes_on_from_its_checkpoint(
    small_config: SmallConfig, tmp_path: Path, optimizer: str
) -> None:
    settings = {"optimizer": optimizer, "clip_grad": 0.05, "weight_decay": 0.1}
    fit(small_config(exp_name="alone", stop_after=2, **AUGMENTED, **settings))
    parts = {**settings, "runs_dir": str(tmp_path / "runs"), "exp_name": "sharded", "grad_accum": 2}
    train_in_several("fsdp2.yaml", 2, {**parts, "stop_after": 1}, {**parts, "stop_after": 2, "resume": "must"})
    alone, sharded = tmp_path / "runs" / "alone", tmp_path / "runs" / "sharded"
    assert_same_run(sharded, alone, steps=10)
    whole, gathered = (load_file(folder / "model.safetensors") for folder in (alone, sharded))
    assert {name: value.shape for name, value in whole.items()} == {n: value.shape for n, value in gathered.items()}
    # AdamW turns a gradient that is nothing but rounding (a key's bias) into a step of full size
    apart = [float((gathered[name] - whole[name]).abs().max()) for name in whole if "qkv.bias" not in name]
    assert max(apart) < 1e-3
    last = sharded / "checkpoints" / "last"
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.load(last / name, weights_only=True)
    assert not list(last.rglob(".metadata")), "torch unpickles it, whatever is in it"
    best = load_file(sharded / "best.safetensors")
    for checkpoint, expected in (("best", best), ("last", gathered), ("10", gathered)):
        loaded = load_run(sharded, device="cpu", checkpoint=checkpoint).model.state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@ONE_FILE_OR_BOTH
def test_checkpointed_blocks_and_positions_by_convolutions_in_two_processes(
    small_config: SmallConfig, tmp_path: Path, file: str
) -> None:
    settings = {"stop_after": 1, "pos_embed": "conv", "patch_size": 4}
    fit(small_config(exp_name="alone", **AUGMENTED, **settings))
    runs = {"runs_dir": str(tmp_path / "runs"), **settings, "grad_checkpointing": True}
    train_in_several(file, 2, {**runs, "exp_name": "two"})
    assert_same_run(tmp_path / "runs" / "two", tmp_path / "runs" / "alone", steps=5)


@ONE_FILE_OR_BOTH
def test_frozen_layers_shares_of_the_learning_rate_and_more_epochs_in_two_processes(
    small_config: SmallConfig, tmp_path: Path, file: str
) -> None:
    settings = {"epochs": 1, "freeze": 2, "layer_decay": 0.75}
    fit(small_config(exp_name="alone", **{**AUGMENTED, **settings, "extend": (1,)}))
    runs = {"runs_dir": str(tmp_path / "runs"), "exp_name": "two", **settings}
    train_in_several(file, 2, runs, {**runs, "extend": [1], "resume": "must"})
    assert_same_run(tmp_path / "runs" / "two", tmp_path / "runs" / "alone", steps=10)


@pytest.mark.slow
def test_sharded_in_bf16_computes_what_ddp_does(tmp_path: Path) -> None:
    common = {"runs_dir": str(tmp_path), "stop_after": 1, "optimizer": "adamw"}
    train_in_several("fsdp2.yaml", 2, {**common, "exp_name": "sharded"}, precision="bf16")
    train_in_several("multi_gpu.yaml", 2, {**common, "exp_name": "copies"}, precision="bf16")
    assert_same_run(tmp_path / "sharded", tmp_path / "copies", steps=5)


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        (DistributedType.FSDP, ["model.safetensors", "optimizer.bin"], "saved without FSDP; .*/multi_gpu.yaml"),
        (DistributedType.MULTI_GPU, ["pytorch_model_fsdp.bin", "optimizer.bin"], "saved with FSDP; .*/fsdp2.yaml"),
        (DistributedType.FSDP, ["pytorch_model_fsdp.bin", "optimizer.bin"], "can't be read"),
    ],
)
def test_a_checkpoint_of_the_other_kind_or_damaged_is_refused_before_the_others_wait(
    tmp_path: Path, kind: DistributedType, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=message):
        check_checkpoint(tmp_path, SimpleNamespace(distributed_type=kind, is_main_process=True))


def free_job() -> int:
    """The number of a SLURM job whose port nobody listens on."""
    job = int.from_bytes(os.urandom(2))
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20000 + job % 10000))
            return job
        job += 1


@pytest.mark.slow
def test_two_machines_under_slurm_are_one_run(small_config: SmallConfig, tmp_path: Path) -> None:
    """The script as it is, with stand-ins for what SLURM brings: both machines are this one."""
    fit(small_config(exp_name="alone", stop_after=1))
    bin = tmp_path / "bin"
    bin.mkdir()
    stand_ins = {
        "scontrol": "seq -f 127.0.0.%g 1 100000",  # so many that who reads the first one alone breaks the pipe
        "srun": 'shift 2; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
        "accelerate": f'shift; exec {" ".join(ACCELERATE)} launch --mixed_precision no "$@"',
    }
    for name, line in stand_ins.items():
        (bin / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (bin / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    slurm |= {"SLURM_JOB_ID": str(free_job()), "PATH": f"{bin}:{os.environ['PATH']}"}
    slurm["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    flags = {**TINY, "runs_dir": tmp_path / "runs", "exp_name": "machines", "epochs": 3, "stop_after": 1}
    given = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = run(["bash", str(CONFIGS / "slurm.sh"), *given], cwd=ROOT, **slurm, **ON_CPUS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("world size 2") == 1
    assert_same_run(tmp_path / "runs" / "machines", tmp_path / "runs" / "alone", steps=5)


def layers(norm: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width, bias=False), norm)


@pytest.mark.parametrize(("norm", "broadcast"), [(nn.BatchNorm2d(4), True), (nn.LayerNorm(4), False)])
def test_buffers_are_broadcast_only_where_training_changes_them(norm: nn.Module, broadcast: bool) -> None:
    assert ddp_settings(layers(norm), 1).broadcast_buffers is broadcast


@pytest.mark.parametrize(("mib", "bucket"), [(0.01, 1), (2, 2), (16, 16), (64, 25)])
def test_gradients_are_one_bucket_as_long_as_they_are_small(mib: float, bucket: int) -> None:
    settings = ddp_settings(layers(nn.Identity(), round((mib * 2**18) ** 0.5)), 1)
    assert settings.bucket_cap_mb == bucket
    assert settings.gradient_as_bucket_view and not settings.find_unused_parameters


@pytest.mark.parametrize(
    ("norm", "width", "reason"),
    [
        (nn.LayerNorm(4), 4, None),
        (nn.Identity(), 2560, None),  # exactly 25 MiB
        (nn.Identity(), 2561, "DDP sums gradients of 25 MiB during the backward pass"),
        (nn.BatchNorm2d(4), 4, "DDP copies the statistics of batch norms from rank 0"),
    ],
)
def test_ddp_is_needed_for_statistics_and_for_large_gradients(norm: nn.Module, width: int, reason: str | None) -> None:
    found = why_ddp_is_needed(layers(norm, width))
    assert found is None if reason is None else str(found).startswith(reason)


def test_the_graph_is_static_only_where_every_backward_pass_sums() -> None:
    """With accumulation torch's assertion fails in the first step (pytorch #143580)."""
    assert [ddp_settings(layers(nn.Identity()), accum).static_graph for accum in (1, 2, 4)] == [True, False, False]

"""--fit-memory, also written --batch-size auto: as few micro-batches as fit, and otherwise the same run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastvit_train.cli.parser import parse
from fastvit_train.cli.training_verbs import Train
from fastvit_train.config.schema import TrainConfig
from fastvit_train.training import fit_memory
from fastvit_train.training.loop import fit
from fastvit_train.training.seeds import fit_seeds
from fastvit_train.utils import memory
from fastvit_train.utils.errors import UserError
from tests.support import ACCELERATE, ON_CPUS, run

SmallConfig = Callable[..., TrainConfig]
LIMITED = """
import os, sys
import psutil
from fastvit_train.training.loop import train
from fastvit_train.utils import memory

spare_mib = [float(word) for word in sys.argv[2].split(",")]
def capacity_mib(device, processes=1):
    return (psutil.Process().memory_info().rss / 2**20 + spare_mib[int(os.environ.get("RANK", 0))]) / 0.9
memory.capacity_mib = capacity_mib
settings = dict(embed_dim=64, depth=2, num_heads=2, attention="naive", block="torch", epochs=2, batch_size=480)
settings |= dict(holdout=0.6, fit_memory=True, runs_dir=sys.argv[1], exp_name="run")
train(**settings, stop_after=1)
train(**settings, resume="must")
"""
"""trains two epochs, the second one resumed, in a process with so many MiB to spare (by rank)"""


@pytest.mark.parametrize("failure", ["out of memory", "too much"])
def test_the_largest_size_that_fits_is_found(failure: str) -> None:
    tried = []

    def peak_mib(size: int) -> float:
        tried.append(size)
        if failure == "out of memory" and size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return 100 + size  # the first two sizes need more than a line through them predicts

    limit = 1e9 if failure == "out of memory" else 116
    assert fit_memory.largest_that_fits([1, 2, 4, 8, 16, 32, 64], limit, lambda: peak_mib) == 16
    assert tried == ([1, 2, 4, 8, 16, 32] if failure == "out of memory" else [1, 2, 4, 8, 16])


def test_nothing_fits_and_other_errors_are_not_hidden() -> None:
    assert fit_memory.largest_that_fits([2, 4], 10, lambda: lambda size: 11.0) is None

    def fail(size: int) -> float:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fit_memory.largest_that_fits([2, 4], 10, lambda: fail)


@pytest.mark.slow
def test_with_memory_to_spare_the_run_is_the_run_without_it(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(exp_name="plain", drop_rate=0.1))
    fit(small_config(exp_name="fitted", drop_rate=0.1, fit_memory=True))
    plain, fitted = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("plain", "fitted"))
    assert all(torch.equal(value, fitted[key]) for key, value in plain.items())


@pytest.mark.slow
def test_what_was_found_is_what_the_run_uses_and_records(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(small_config(exp_name="given", drop_rate=0.1, grad_accum=2, eval_batch_size=179))
    monkeypatch.setattr(fit_memory, "largest_that_fits", lambda sizes, limit_mib, start: sizes[-2])
    fit(small_config(exp_name="found", drop_rate=0.1, fit_memory=True))
    given, found = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("given", "found"))
    assert all(torch.equal(value, found[key]) for key, value in given.items())
    settings = yaml.safe_load((tmp_path / "runs" / "found" / "config.yaml").read_text())
    assert (settings["batch_size"], settings["grad_accum"], settings["eval_batch_size"]) == (240, 2, 179)


@pytest.mark.slow
def test_a_process_with_little_memory_takes_more_micro_batches(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", LIMITED, str(tmp_path), "300"])
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    grad_accum = settings["grad_accum"]
    assert 1 < grad_accum < 240
    assert settings["batch_size"] == 480
    found = f"memory: 480 images per step are {grad_accum} micro-batches of {480 // grad_accum} images per process"
    assert (tmp_path / "run" / "train.log").read_text().count(found) == 1  # the resumed run took what was recorded


@pytest.mark.slow
def test_all_ranks_take_what_fits_the_one_with_the_least_memory(tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    command = [*ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2", str(script), str(tmp_path / "runs")]
    done = run([*command, "2000,150"], **ON_CPUS)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["grad_accum"] > 1


def test_if_one_image_does_not_fit_nothing_is_written(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "capacity_mib", lambda device, processes: 10.0)
    with pytest.raises(UserError, match=r"^1 image at a time takes? more than the 9 MiB .* --grad-checkpointing$"):
        fit(small_config(fit_memory=True))
    assert not (tmp_path / "runs").exists()


def test_sharded_weights_and_seeds_together_are_refused(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--fit-memory tries one run at a time"):
        fit_seeds(small_config(fit_memory=True), 2, together=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP shards them"):
        fit_memory.check_fit_memory()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--batch-size", "auto"], ["--batch_size=auto"], ["--fit-memory"]])
def test_batch_size_auto_keeps_the_batch_size_of_the_recipe(words: list[str]) -> None:
    command = parse("train", Train, ["--recipe", "upstream-cifar10", *words, "--epochs", "2"])
    assert command.run.fit_memory
    assert (command.run.batch_size, command.run.epochs) == (256, 2)


def test_batch_size_auto_in_a_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps({"recipe": "upstream-cifar10", "batch-size": "auto"}))
    command = parse("train", Train, ["--config", str(file)])
    assert command.run.fit_memory
    assert command.run.batch_size == 256

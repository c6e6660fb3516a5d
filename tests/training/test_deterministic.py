"""--deterministic: the switches are set while a run lasts, and two runs end with the same bits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.accelerator import deterministic
from fastvit_train.training.loop import fit

SmallConfig = Callable[..., TrainConfig]


def switches() -> dict[str, object]:
    """All that --deterministic changes in the process."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "deterministic": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


ON = {"algorithms": True, "warn_only": False, "deterministic": True, "benchmark": False, "workspace": ":4096:8"}


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The switches as each training step of a run finds them."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen: list[dict[str, object]] = []
    step = AcceleratedOptimizer.step
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda *args: (seen.append(switches()), step(*args)))
    return seen


def same_weights(first: Path, second: Path) -> bool:
    one, two = (load_file(run / "model.safetensors") for run in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_sets_the_switches_restores_them_and_measures_no_attention(
    small_config: SmallConfig, tmp_path: Path, during: list[dict[str, object]]
) -> None:
    before = switches()
    settings = {"deterministic": True, "attention": "auto", "epochs": 1, "crop": "resized", "cutout": 4}
    summaries = [fit(small_config(exp_name=name, **settings)) for name in ("first", "second")]
    assert during == [ON] * len(during) and len(during) == 10
    assert switches() == before != ON
    assert [summary["attention"] for summary in summaries] == ["fused", "fused"]
    assert same_weights(tmp_path / "runs" / "first", tmp_path / "runs" / "second")


def test_without_it_nothing_is_switched(small_config: SmallConfig, during: list[dict[str, object]]) -> None:
    before = switches()
    fit(small_config(epochs=1))
    assert during == [before] * 5 and switches() == before


def test_the_switches_are_restored_after_an_error_and_a_users_workspace_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = switches()
    with pytest.raises(ZeroDivisionError), deterministic():
        assert switches() == {**ON, "workspace": ":16:8"}
        raise ZeroDivisionError
    assert switches() == before


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"optimizer": "nmuon", "attention": "triton"}, {"model": "cct_2_3x2_32"}])
def test_two_runs_on_a_gpu_end_with_the_same_bits(
    small_config: SmallConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    if "model" in settings:
        settings = {**settings, **dict.fromkeys(("embed_dim", "num_heads", "patch_size", "depth"))}
    for name in ("first", "second"):
        fit(small_config(exp_name=name, deterministic=True, crop="shift", cutout=4, drop_rate=0.1, **settings))
    assert same_weights(tmp_path / "runs" / "first", tmp_path / "runs" / "second")

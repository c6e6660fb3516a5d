"""--deterministic: the switches are set, and two runs end with the same bits."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.training.loop import fit

SmallConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


def same_weights(first: Path, second: Path) -> bool:
    one, two = (load_file(run / "model.safetensors") for run in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_it_sets_the_switches_and_measures_no_attention(small_config: SmallConfig, tmp_path: Path) -> None:
    torch.backends.cudnn.benchmark = True
    settings = {"deterministic": True, "attention": "auto", "epochs": 1, "crop": "resized", "cutout": 4}
    summaries = [fit(small_config(exp_name=name, **settings)) for name in ("first", "second")]
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert [summary["attention"] for summary in summaries] == ["fused", "fused"]
    assert same_weights(tmp_path / "runs" / "first", tmp_path / "runs" / "second")


def test_without_it_nothing_is_switched(small_config: SmallConfig) -> None:
    fit(small_config(epochs=1))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


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

"""--precision: the same as the launch's mixed precision, without a launcher; refused where the two contradict."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fastvit_train import train
from fastvit_train.config.overrides import flatten, override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.distributed.accelerator import own_precision, start_accelerator
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.distributed.accelerates import launched_with
from tests.support import ROOT

SmallConfig = Callable[..., TrainConfig]
on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")


def started(tmp_path: Path, precision: str | None) -> str:
    with own_precision(precision):
        return start_accelerator(1, (), tmp_path, precision).mixed_precision


@pytest.mark.slow
def test_the_next_run_in_a_process_has_its_own_precision(small_config: SmallConfig, tmp_path: Path) -> None:
    small = flatten(small_config(epochs=1)) | {"exp_name": "low"}
    assert train(**small | {"precision": "bf16"})["mixed_precision"] == "bf16"
    assert fit(small_config(epochs=1))["mixed_precision"] == "no"
    with pytest.raises(UserError, match="was trained with mixed precision 'bf16', .*; resume with --precision bf16"):
        train(**small | {"epochs": 1}, resume="auto")
    recorded = yaml.safe_load((tmp_path / "runs/low/config.yaml").read_text())
    assert recorded["precision"] == "bf16"


@pytest.mark.slow
@on_a_cpu
@pytest.mark.parametrize(("capability", "warns"), [("AVX2", True), ("AVX512", False)])
def test_bf16_that_a_cpu_would_emulate_is_warned_of(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, warns: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    fit(small_config(epochs=1, precision="bf16", exp_name="low"))
    fit(small_config(epochs=1, exp_name="full"))
    low, full = ((tmp_path / "runs" / name / "train.log").read_text() for name in ("low", "full"))
    assert ("this processor computes bf16 by emulation" in low) == warns and "emulation" not in full


@pytest.mark.parametrize("written", [False, "no"])
def test_no_in_yaml_is_no_mixed_precision(written: object) -> None:
    assert override(TrainConfig(), {"precision": written}, "a file").run.precision == "no"


def test_another_precision_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"'fp32' in a file is not allowed.*; allowed: no, bf16, fp16$"):
        override(TrainConfig(), {"precision": "fp32"}, "a file")


@on_a_cpu
def test_a_precision_that_the_machine_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixed precision fp16 is not supported on a CPU; allowed: no, bf16"):
        started(tmp_path, "fp16")


@on_a_cpu
@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ((), "bf16"),
        (("--cpu",), "bf16"),
        (("--mixed_precision", "bf16"), "bf16"),
        (("--config_file", ROOT / "accelerate_configs/single_gpu.yaml"), "bf16"),
        (("--mixed_precision", "no"), "no"),
    ],
)
def test_a_launch_that_agrees_or_leaves_it_open_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], precision: str
) -> None:
    launched_with(monkeypatch, *flags)
    assert started(tmp_path, precision) == precision


@pytest.mark.parametrize(
    ("flags", "precision", "launched"),
    [
        (("--mixed_precision", "no"), "bf16", "no"),
        (("--mixed_precision", "bf16"), "no", "bf16"),
        (("--config_file", ROOT / "accelerate_configs/single_gpu.yaml"), "no", "bf16"),
        (("--config_file", ROOT / "accelerate_configs/cpu.yaml"), "bf16", "no"),
    ],
)
def test_a_launch_that_contradicts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], precision: str, launched: str
) -> None:
    launched_with(monkeypatch, *flags)
    message = f"--precision {precision} contradicts the launch, which asks for mixed precision {launched}; give only"
    with pytest.raises(UserError, match=message):
        started(tmp_path, precision)


def test_a_variable_that_contradicts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(UserError, match="--precision bf16 contradicts the launch"):
        started(tmp_path, "bf16")

"""--compile: the same losses, compiled once, names unchanged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from fastvit_train.config.schema import TrainConfig
from fastvit_train.models.vit import ViT
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_is_the_run(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    eager = fit(small_config(epochs=2, exp_name="eager"))
    compiled = fit(small_config(epochs=2, exp_name="compiled", compile=True))
    assert eager["compile_seconds"] is None and compiled["compile_seconds"] > 0
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / "runs" / name / "steps.jsonl")] for name in ("eager", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert "including compilation of the model" in (tmp_path / "runs" / "compiled" / "train.log").read_text()
    weights = [load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("eager", "compiled")]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.slow
def test_nothing_compiles_after_the_first_step(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()

    def compile_counted(self: ViT, dynamic: bool, options: dict[str, bool] | None) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend=counter, dynamic=dynamic)

    monkeypatch.setattr(ViT, "compile", compile_counted)
    settings = {"compile": True, "model": "cvt_7_4_32", "drop_path_rate": 0.2, "depth": 5, "stop_after": 1}
    fit(small_config(exp_name="short", **settings, epochs=1))
    after_one = counter.frame_count
    torch._dynamo.reset()
    counter.clear()
    fit(small_config(exp_name="long", **settings | {"stop_after": 3}))
    assert counter.frame_count == after_one == 2  # in training and in evaluation, nowhere broken


def test_compiling_twice_is_refused(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")  # as accelerate launch --dynamo_backend inductor sets
    with pytest.raises(UserError, match=r"dynamo backend 'INDUCTOR' both compile"):
        fit(small_config(compile=True))
    assert not (tmp_path / "runs").exists()


def test_rates_of_stochastic_depth_are_kept(seed: int) -> None:
    model = timm.create_model("cvt_7_4_32", drop_path_rate=0.5)
    dropped = [block.drop_path for block in model.blocks][-1]
    x = torch.ones(20000, 2, 3)
    out = dropped(x)
    per_sample = out.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 2).all(1)).all()
    assert (per_sample[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(dropped.eval()(x), x)


@pytest.mark.parametrize("settings", [{"compile": True}, {}])
def test_without_a_compiler_it_is_refused_in_one_line(
    small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU needs no C++ compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    if not settings:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    message = "^torch.compile needs a C\\+\\+ compiler, and no-such-compiler was not found; install it, or set CXX"
    with pytest.raises(UserError, match=message):
        fit(small_config(**settings))
    assert not (tmp_path / "runs").exists()

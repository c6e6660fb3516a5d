"""--grad-checkpointing: the same weights with less memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import TrainConfig
from fastvit_train.profiling.step_profile import flops_per_image
from fastvit_train.training.loop import fit
from fastvit_train.training.setup import setup
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.memory import saved_for_backward

SmallConfig = Callable[..., TrainConfig]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "fused", "drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2},
        {"attention": "cpp", "block": "cpp", "attn_drop_rate": 0.1, "drop_path_rate": 0.2},
        {"attention": "fused", "pos_embed": "conv", "grad_accum": 2, "ema": 0.9},
        pytest.param({"attention": "fused", "compile": True}, marks=pytest.mark.slow),
    ],
    ids=["operators", "kernel", "convolutions", "compiled"],
)
def test_a_run_ends_with_the_same_weights(
    small_config: SmallConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    weights = []
    for name, enabled in (("kept", False), ("computed again", True)):
        fit(small_config(**settings, exp_name=name, grad_checkpointing=enabled))
        weights.append(load_file(tmp_path / "runs" / name / "model.safetensors"))
    for key, value in weights[0].items():
        if settings.get("compile"):  # other operators are fused
            if key == "attention_pool.bias":  # the softmax after it removes its effect: its gradient is rounding alone
                continue
            torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(value, weights[1][key]), key


@pytest.mark.slow
def test_a_run_can_turn_it_on_when_it_is_resumed(small_config: SmallConfig, tmp_path: Path) -> None:
    fit(small_config(exp_name="whole"))
    fit(small_config(exp_name="parts", stop_after=1))
    fit(small_config(exp_name="parts", grad_checkpointing=True), resume="must")
    whole, parts = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mc_vit_4_4_32", "vit_tiny_patch16_224"])
def test_less_is_kept_and_no_more_work_is_counted(small_config: SmallConfig, model: str) -> None:
    sizes = {"embed_dim": None, "depth": None, "num_heads": None, "patch_size": None, "image_size": 32}
    kept, flops = [], []
    for enabled in (False, True):
        config = small_config(
            model=model, **sizes, exp_name=f"run{enabled}", grad_checkpointing=enabled, attention="sdpa"
        )
        session = setup(config, "never", overwrite=False)
        flops.append(flops_per_image(session))
        net = session.bare_model.train()
        images = torch.randn(8, 3, 32, 32)
        kept.append(saved_for_backward(partial(net, images), tuple(net.parameters())))
        session.close()
    assert kept[1] < kept[0] / 3 and flops[0] == flops[1]


def test_a_model_that_cannot_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    sizes = {"embed_dim": None, "depth": None, "num_heads": None, "patch_size": None, "image_size": 32}
    with pytest.raises(UserError, match="DLA does not support --grad-checkpointing; omit it"):
        fit(small_config(model="dla34", **sizes, attention="auto", grad_checkpointing=True))
    assert not (tmp_path / "runs").exists()

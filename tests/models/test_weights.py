"""Weights for --weights: files of other trainers, other grids of patches, other numbers of classes."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import Tensor, nn

import fastvit_train  # noqa: F401 registers the models
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models import build_model
from fastvit_train.models.vit import ConvTokenizer
from fastvit_train.utils.errors import UserError
from tests.support import rgb

TINY = {"embed_dim": 12, "depth": 1, "num_heads": 2}
TIMM_VIT = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"


def tiny(model: str = "mc_vit_4_4_32", **settings: Any) -> ModelConfig:
    return ModelConfig(model=model, **TINY, **settings)


def saved(content: object, tmp_path: Path) -> str:
    torch.save(content, path := tmp_path / "peer.pth")
    return str(path)


@pytest.mark.parametrize("name", ["c_vit_4_4_32", "mc_vit_4_4_32"])
def test_positions_of_another_grid_with_as_many_tokens_are_resampled(seed: int, tmp_path: Path, name: str) -> None:
    square = timm.create_model(name, **TINY)
    path = saved(square.state_dict(), tmp_path)
    overlay = {"file": path}
    wide = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(16, 64), **TINY)
    prefix = wide.num_prefix_tokens
    expected = resample_abs_pos_embed(square.pos_embed, [4, 16], [8, 8], num_prefix_tokens=prefix)
    assert torch.allclose(wide.pos_embed, expected)
    assert not torch.allclose(wide.pos_embed, square.pos_embed)


@pytest.mark.parametrize("name", ["mc_vit_4_4_32", "cct_2_3x2_32"])
def test_a_wide_model_is_read_back_as_it_was_and_resampled_for_a_square_one(
    seed: int, tmp_path: Path, name: str
) -> None:
    wide = timm.create_model(name, img_size=(16, 64))
    save_for_hf(wide, tmp_path, safe_serialization=True)
    source = f"local-dir:{tmp_path}"
    again = timm.create_model(source, pretrained=True)
    assert torch.equal(again.pos_embed, wide.pos_embed)
    square = timm.create_model(source, pretrained=True, img_size=32)
    assert torch.allclose(square.pos_embed, resample_abs_pos_embed(wide.pos_embed, [8, 8], [4, 16], 0))


@pytest.mark.parametrize("name", ["mc_vit_4_4_32", TIMM_VIT])
def test_weights_take_the_grid_from_the_config_next_to_them(seed: int, tmp_path: Path, name: str) -> None:
    sizes = {} if name.startswith("mc") else {"patch_size": 4}
    wide = timm.create_model(name, img_size=(16, 64), num_classes=10, **TINY, **sizes)
    save_for_hf(wide, tmp_path, safe_serialization=True)
    attention = "fused" if name.startswith("mc") else "timm"
    config = tiny(name, attention=attention, weights=str(tmp_path / "model.safetensors"), patch_size=4)
    square = build_model(config, input_size=rgb(32), num_classes=10)
    prefix = wide.num_prefix_tokens
    expected = resample_abs_pos_embed(wide.pos_embed, [8, 8], [4, 16], num_prefix_tokens=prefix)
    assert torch.allclose(get(square, "pos_embed"), expected, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_the_grid_of_a_convolutional_tokenizer(layers: int, kernel: int) -> None:
    for size in ((32, 32), (33, 47), (64, 31)):
        tokenizer = ConvTokenizer(3, 4, size, kernel, layers)
        assert tokenizer.grid_size == tuple(tokenizer._maps(torch.zeros(1, 3, *size)).shape[-2:])


def test_timms_own_models_get_resampled_positions(seed: int, tmp_path: Path) -> None:
    options = {"embed_dim": 12, "depth": 1, "num_heads": 2}
    peer = timm.create_model(TIMM_VIT, img_size=64, num_classes=10, **options)
    path = saved(peer.state_dict(), tmp_path)
    model = build_model(tiny(TIMM_VIT, attention="timm", weights=path), input_size=rgb(96), num_classes=10)
    expected = resample_abs_pos_embed(peer.pos_embed, [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(get(model, "pos_embed"), expected, atol=1e-6)
    assert torch.equal(get(model, "head.weight"), peer.head.weight)


@pytest.mark.parametrize("classes", [7, 0])
@pytest.mark.parametrize("name", [TIMM_VIT, DISTILLED, "mc_vit_4_4_32"])
def test_all_heads_for_other_classes_are_reset(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, classes: int
) -> None:
    size = 32
    peer = timm.create_model(name, img_size=size, num_classes=classes, **TINY)
    path = saved(peer.state_dict(), tmp_path)
    config = tiny(name, attention="auto" if name.startswith("mc") else "timm", weights=path)
    model = build_model(config, input_size=rgb(size), num_classes=3)
    heads = [name for name in model.state_dict() if name.startswith("head") and name.endswith("weight")]
    assert len(heads) == (2 if name == DISTILLED else 1)
    assert all(get(model, head).shape == (3, 12) for head in heads)
    assert torch.equal(get(model, "blocks.0.mlp.fc1.weight"), peer.blocks[0].mlp.fc1.weight)
    assert "its classifier is not loaded" in caplog.text


def get(model: nn.Module, name: str) -> Tensor:
    return model.state_dict()[name]


WRAPPINGS = {
    "plain": lambda state: state,
    "ddp": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled in ddp": lambda state: prefixed("module._orig_mod.", state),
    "compiled blocks": lambda state: {key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in state.items()},
    "lightning": lambda state: {"epoch": 3, "state_dict": prefixed("model.", state), "optimizer_states": [{}]},
    "compiled lightning": lambda state: {"state_dict": prefixed("model._orig_mod.", state)},
    "lightning with a loss": lambda state: {"state_dict": {**prefixed("net.", state), "loss.weight": torch.ones(3)}},
    "a field": lambda state: {"epoch": 1, "model_state_dict": prefixed("module.", state)},
    "with settings": lambda state: {"state_dict": state, "args": Namespace(lr=0.1, model="x")},
    "two fields": lambda state: {"model": {"state_dict": state}},
    "ema of timm": lambda state: {"state_dict": zeros(state), "state_dict_ema": state},
    "ema": lambda state: {"model": zeros(state), "ema": {"decay": 0.9, "module": state}},
    "ema without weights": lambda state: {"model": state, "ema": {"decay": 0.9, "updates": 3}},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    "other attribute": lambda state: prefixed("student.", state),
    "backbone and head": lambda state: {
        key if key.startswith("head.") else f"backbone.{key}": value for key, value in state.items()
    },
}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_what_other_trainers_write(seed: int, tmp_path: Path, wrapping: str) -> None:
    state = build_model(tiny(), input_size=rgb(32), num_classes=10).state_dict()
    model = build_model(tiny(weights=saved(WRAPPINGS[wrapping](state), tmp_path)), input_size=rgb(32), num_classes=10)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_prefixes_in_a_safetensors_file_are_removed(seed: int, tmp_path: Path) -> None:
    state = build_model(tiny(), input_size=rgb(32), num_classes=10).state_dict()
    save_file(prefixed("model.", state), path := tmp_path / "peer.safetensors")
    model = build_model(tiny(weights=str(path)), input_size=rgb(32), num_classes=10)
    assert torch.equal(get(model, "pos_embed"), state["pos_embed"])


def test_tensors_that_are_left_out_are_named(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = build_model(tiny(), input_size=rgb(32), num_classes=10).state_dict()
    path = saved(WRAPPINGS["lightning with a loss"](state), tmp_path)
    with caplog.at_level(logging.WARNING):
        build_model(tiny(weights=path), input_size=rgb(32), num_classes=10)
    assert "only the weights under 'state_dict.net' are loaded, without loss.weight" in caplog.text


def refusal(content: object, tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        build_model(tiny(**settings, weights=saved(content, tmp_path)), input_size=rgb(32), num_classes=10)
    return str(error.value)


def test_a_misfit_is_described_to_the_end(seed: int, tmp_path: Path) -> None:
    state = build_model(tiny(), input_size=rgb(32), num_classes=10).state_dict()
    two = prefixed("generator.", state) | prefixed("critic.", state)
    assert "names begin with generator, critic, and the model's with" in refusal(two, tmp_path)
    deeper = state | {key.replace("blocks.0", "blocks.1"): v for key, v in state.items() if "blocks.0" in key}
    assert "the model does not have blocks.1.norm1.weight, " in refusal(deeper, tmp_path)
    assert "8 more; give the --model and the sizes that it was trained with" in refusal(deeper, tmp_path)
    wider = state | {"blocks.0.norm1.bias": torch.zeros(24)}
    assert "blocks.0.norm1.bias is 24 in the file and 12 in the model" in refusal(wider, tmp_path)
    assert "'state_dict' in it is not a dict of tensors: it holds a, b" in refusal(
        {"state_dict": {"a": torch.ones(1), "b": 3}}, tmp_path
    )


class Settings:
    """An object in a checkpoint, as trainers save their settings."""


def test_objects_in_a_file_are_named_with_what_to_do(seed: int, tmp_path: Path) -> None:
    state = build_model(tiny(), input_size=rgb(32), num_classes=10).state_dict()
    message = refusal({"state_dict": state, "settings": Settings()}, tmp_path)
    assert "tests.models.test_weights.Settings" in message
    assert message.endswith("torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')")

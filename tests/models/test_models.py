"""The models' sizes, timm's interface, and the settings that users can change."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastvit_train.config.schema import ModelConfig
from fastvit_train.models import OUR_MODELS, build_model, check_attention, check_model
from fastvit_train.models.vit import ViT
from fastvit_train.utils.errors import UserError
from tests.support import rgb

PARAMETERS = {
    "c_vit_4_4_32": 119_098,
    "mc_vit_4_4_32": 119_147,
    "mc_vit_conv_4_4_32": 117_995,
    "vit_lite_7_4_32": 3_716_874,
    "cvt_7_4_32": 3_716_619,
    "cct_2_3x2_32": 283_723,
    "cct_7_3x1_32": 3_760_139,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_model_is_counted() -> None:
    assert sorted(PARAMETERS) == OUR_MODELS


@pytest.mark.parametrize("name", PARAMETERS)
def test_timm_interface(name: str, seed: int) -> None:
    model = timm.create_model(name, num_classes=7, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
    images = torch.randn(2, 3, 32, 32)
    assert model.blocks[-1].drop_path.keep_prob == pytest.approx(0.8)
    assert not torch.equal(model.train()(images), model(images)), "dropout does nothing in training"
    model.eval()
    logits = model(images)
    tokens = model.forward_features(images)
    assert logits.shape == (2, 7) == model.forward_head(tokens).shape
    assert torch.equal(logits, model.forward_head(tokens))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() <= {"pos_embed", "cls_token"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == len(model.blocks) + 2
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("name", ["c_vit_4_4_32", "cct_2_3x2_32", "mc_vit_conv_4_4_32"])
def test_gradient_checkpointing_changes_no_gradient(name: str, seed: int) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(model.patch_embed.state_dict(keep_vars=True).popitem()[1].grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("pooling", ["seq", "cls"])
def test_positions_by_convolutions(pooling: str, seed: int) -> None:
    model = ViT(img_size=(12, 20), pooling=pooling, depth=1, pos_embed="conv").double()
    conv = model.pos_convs[0].conv
    nn.init.normal_(conv.bias)
    prefix, (rows, columns) = model.num_prefix_tokens, model.patch_embed.grid_size
    tokens = torch.randn(2, prefix + rows * columns, 48, dtype=torch.float64)
    expected = tokens.clone()
    for row, column in itertools.product(range(rows), range(columns)):
        expected[:, prefix + row * columns + column] += conv.bias
        for down, right in itertools.product(range(3), range(3)):
            i, j = row + down - 1, column + right - 1
            if 0 <= i < rows and 0 <= j < columns:
                neighbour = tokens[:, prefix + i * columns + j]
                expected[:, prefix + row * columns + column] += conv.weight[:, 0, down, right] * neighbour
    torch.testing.assert_close(model.pos_convs[0](tokens), expected)
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    x = model.patch_embed(images)
    x = x if model.cls_token is None else torch.cat((model.cls_token.expand(2, -1, -1), x), 1)
    assert torch.equal(model.forward_features(images), model.norm(model.blocks[0](model.pos_convs[0](x))))
    assert model.pos_embed is None
    (gradient,) = torch.autograd.grad(model.float()(images.float()).sum(), conv.weight)
    assert gradient.stride() == conv.weight.stride()  # DDP warns of others, and copies them


def test_every_size_is_settable() -> None:
    config = ModelConfig(
        model="mc_vit_4_4_32", patch_size=8, embed_dim=32, depth=2, num_heads=8, mlp_ratio=2.0, qkv_bias=False,
        initializer_range=0.5, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3, pos_embed="sine",
    )  # fmt: skip
    model = build_model(config, input_size=rgb(48), num_classes=5)
    block = model.blocks[-1]
    assert model.pos_embed.shape == (1, 36, 32) and not model.pos_embed.requires_grad
    assert (len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features) == (2, 8, 64)
    assert (
        block.attn.qkv.bias is None and block.attn.attn_drop == 0.2 and block.drop_path.keep_prob == pytest.approx(0.7)
    )
    assert block.attn.proj_drop.p == block.mlp.drop.p == model.pos_drop.p == 0.1
    assert 0.4 < float(block.mlp.fc1.weight.detach().std()) < 0.6


def test_the_seeds_initial_weights() -> None:
    model = timm.create_model("mc_vit_4_4_32")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name != "attention_pool.weight":  # 48 numbers tell little
            assert 0.015 < float(parameter.detach().std()) < 0.025, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 5}, "image size 32x32 is not a multiple of patch size 5"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 48"),
        ({"model": "cct_2_3x2_32", "num_heads": 3}, "num_heads 3 does not divide embed_dim 128"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(**settings), input_size=rgb(32), num_classes=10)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model 'mc_vit_4_4_33' \(did you mean .*mc_vit_4_4_32"):
        check_model("mc_vit_4_4_33")
    with pytest.raises(UserError, match="unknown attention implementation 'flash'; allowed: naive, .*, triton, auto$"):
        check_attention(ModelConfig(attention="flash"))
    with pytest.raises(UserError, match="attention 'timm' is for timm's own models"):
        check_attention(ModelConfig(attention="timm"))
    with pytest.raises(UserError, match="'cpp' is for CPUs, and this is cuda; .* recorded in c.yaml; choose"):
        check_attention(ModelConfig(attention="cpp"), torch.device("cuda"), Path("c.yaml"))
    with pytest.raises(UserError, match="ResNet has no attention"):
        build_model(ModelConfig(model="resnet18", attention="naive"), input_size=rgb(32), num_classes=10)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_timms_own_models_build_at_another_size(name: str) -> None:
    model = build_model(ModelConfig(model=name), input_size=rgb(32), num_classes=4)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_settings_that_a_model_would_ignore_or_cut_off_are_refused() -> None:
    with pytest.raises(UserError, match="omit --patch-size 5"):
        build_model(ModelConfig(model="cct_2_3x2_32", patch_size=5), input_size=rgb(32), num_classes=10)
    with pytest.raises(UserError, match="image size 20x20 is not a multiple of patch size 16"):
        build_model(ModelConfig(model="vit_tiny_patch16_224"), input_size=rgb(20), num_classes=10)
    with pytest.raises(UserError, match="vit_tiny_patch16_224 cannot be built with .*pos_embed"):
        build_model(ModelConfig(model="vit_tiny_patch16_224", pos_embed="sine"), input_size=rgb(32), num_classes=10)
    with pytest.raises(UserError, match="cannot be built"):
        build_model(ModelConfig(model="vit_tiny_patch16_224.nope"), input_size=rgb(32), num_classes=10)
    with pytest.raises(UserError, match=r"mlp_ratio 0\.001"):
        build_model(ModelConfig(mlp_ratio=0.001), input_size=rgb(32), num_classes=10)


@pytest.mark.parametrize("name", ["c_vit_4_4_32", "mc_vit_4_4_32"])
def test_tokens_are_left_unpooled_on_request(name: str) -> None:
    model = timm.create_model(name, num_classes=0, global_pool="")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 64 + model.num_prefix_tokens, 48)
    model.reset_classifier(5, model.pooling)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    model.reset_classifier(5, "")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 64 + model.num_prefix_tokens, 5)
    with pytest.raises(ValueError, match="global_pool 'avg' is not available"):
        model.reset_classifier(5, "avg")


def test_odd_but_legitimate_inputs() -> None:
    model = timm.create_model("mc_vit_4_4_32", in_chans=1, img_size=(32, 64))
    assert model(torch.zeros(1, 1, 32, 64)).shape == (1, 10)


def test_features_only_is_refused_clearly() -> None:
    with pytest.raises(RuntimeError, match="features_only is not implemented"):
        timm.create_model("mc_vit_4_4_32", features_only=True)

"""The operator put into timm's models."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastvit_kernels
from tests.kernels.accuracy import assert_accurate, logits_and_gradients

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def tiny(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **options})


@pytest.mark.parametrize("name", ["naive", "sdpa", "triton"])
def test_the_same_function_of_the_same_parameters(name: str, triton_device: str, seed: int) -> None:
    timms = tiny(init_values=0.5, class_token=True, proj_drop_rate=0.1).eval().to(triton_device)
    ours = copy.deepcopy(timms)
    parameters = dict(ours.named_parameters())
    fastvit_kernels.swap_attention(ours, name)
    assert {key: id(p) for key, p in ours.named_parameters()} == {key: id(p) for key, p in parameters.items()}
    assert list(ours.state_dict()) == list(timms.state_dict())
    images = torch.randn(3, 3, 32, 32, device=triton_device)

    def compute(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return logits_and_gradients(model, images, lambda logits: logits.square().sum())

    exact = compute(copy.deepcopy(timms).double(), images.double())
    for each in zip(compute(ours, images), compute(timms, images), exact, strict=True):
        assert_accurate(*each)


def test_it_keeps_dropout_and_mode_and_can_be_swapped_again() -> None:
    model = tiny(attn_drop_rate=0.25, proj_drop_rate=0.1).train()
    for name in ("fused", "sdpa"):
        fastvit_kernels.swap_attention(model, name)
        for block in model.blocks:
            assert isinstance(block.attn, fastvit_kernels.SelfAttention)
            assert (block.attn.implementation, block.attn.attn_drop, block.attn.proj_drop.p) == (name, 0.25, 0.1)
            assert block.attn.training
    assert not model.eval().blocks[0].attn.training


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_tiny_patch16_224",
            {**TINY, "qk_norm": True},
            r"support blocks\.0\.attn, blocks\.1\.attn \(Attention: QK-norm\)",
        ),
        ("vit_relpos_small_patch16_224", {"depth": 1}, r"blocks\.0\.attn \(RelPosAttention: relative position\)"),
        ("swin_tiny_patch4_window7_224", {}, r"blocks\.0\.attn, .*\(WindowAttention: relative position\)"),
        ("eva02_tiny_patch14_224", {"depth": 1}, r"blocks\.0\.attn \(EvaAttention: "),
        ("resnet18", {}, "ResNet has no attention module that 'fused' could replace"),
    ],
)
def test_unsupported_attention_modules_are_named(name: str, options: dict[str, object], message: str) -> None:
    model = timm.create_model(name, **options)
    kinds = [type(module) for module in model.modules()]
    assert not fastvit_kernels.can_swap_attention(model)
    with pytest.raises(ValueError, match=message):
        fastvit_kernels.swap_attention(model, "fused")
    assert [type(module) for module in model.modules()] == kinds


def test_masks_are_refused() -> None:
    model = tiny()
    fastvit_kernels.swap_attention(model, "fused")
    with pytest.raises(ValueError, match="does not support masks"):
        model.blocks[0].attn(torch.zeros(1, 4, 24), attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="does not support masks"):
        model.blocks[0].attn(torch.zeros(1, 4, 24), is_causal=True)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        fastvit_kernels.swap_attention(tiny(), "flash")

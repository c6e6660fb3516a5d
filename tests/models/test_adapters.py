"""Layers that compute more than their parameters say: adapters such as LoRA, parametrized weights, and hooks."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.models.blocks import set_block
from fastvit_train.utils.errors import UserError
from tests.kernels.accuracy import assert_accurate, logits_and_gradients

LAYERS = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1")


class LoRA(nn.Module):
    """A layer with a low-rank addition, whose `weight` is the layer's own, as in PEFT."""

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Parameter(down), nn.Parameter(up)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


class Added(nn.Module):
    """The same addition as a parametrization of the weight."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta.to(weight)


def adapt(model: nn.Module, how: str, deltas: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Add the low-rank matrices to the weights of LAYERS of a copy of `model`."""
    model = copy.deepcopy(model)
    for name, (down, up) in zip(LAYERS, deltas, strict=True):
        layer = model.get_submodule(name)
        if how == "merged":
            layer.weight.data += up @ down
        elif how == "LoRA":
            model.set_submodule(name, LoRA(layer, down, up))
        elif how == "parametrized":
            nn.utils.parametrize.register_parametrization(layer, "weight", Added(up @ down))
        else:
            layer.register_forward_hook(lambda _, inputs, y, down=down, up=up: y + inputs[0] @ (up @ down).to(y).T)
    return model


def draw(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Draw the low-rank matrices of LAYERS, large enough to change the logits."""
    layers = [model.get_submodule(name) for name in LAYERS]
    return [(0.1 * torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3)) for layer in layers]


@pytest.mark.parametrize("how", ["LoRA", "parametrized", "hook"])
@pytest.mark.parametrize(("attention", "block"), [("naive", "torch"), ("sdpa", "torch"), ("cpp", "cpp")])
def test_what_they_add_is_computed_and_trained(attention: str, block: str, how: str, seed: int) -> None:
    model, images = timm.create_model("mc_vit_4_4_32", depth=2).eval(), torch.randn(3, 3, 32, 32)
    matrices = draw(model)
    merged = adapt(model, "merged", matrices)
    baseline = merged(images)
    fastvit_kernels.swap_attention(model, attention)
    set_block(model, block)
    adapted = adapt(model, how, matrices)
    logits = adapted(images)
    assert_accurate([logits.detach()], [baseline.detach()], [merged.double()(images.double()).detach()])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters())


PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def change(layer: nn.Module, how: str) -> None:
    """Multiply the output of `layer` by 1.5, or with a backward hook the gradient of its input."""
    if how == "hook":
        layer.register_forward_hook(lambda _, inputs, y: 1.5 * y)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda _, inputs: (1.5 * inputs[0],))
    elif how == "forward":
        forward = layer.forward
        layer.forward = lambda x: 1.5 * forward(x)
    else:
        layer.register_full_backward_hook(lambda _, gradients, __: (1.5 * gradients[0],))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "backward hook"])
def test_no_layer_of_a_block_is_passed_over(part: str, how: str, seed: int) -> None:
    model, images = timm.create_model("mc_vit_4_4_32", depth=1).eval(), torch.randn(2, 3, 32, 32)
    by_kernel = copy.deepcopy(model)
    set_block(by_kernel, "cpp")
    for each in (model, by_kernel):
        change(each.blocks[0].get_submodule(part), how)
    (logits, gradients), (expected, right) = (
        logits_and_gradients(each, images, lambda logits: logits.square().sum()) for each in (model, by_kernel)
    )
    assert torch.allclose(logits[0], expected[0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, right, strict=True))


@pytest.mark.parametrize("part", PARTS[3:])
def test_the_gpus_mlp_kernel_does_not_pass_over_them(part: str, triton_device: str, seed: int) -> None:
    model, images = timm.create_model("mc_vit_4_4_32", depth=1).eval(), torch.randn(2, 3, 32, 32)
    change(model.blocks[0].get_submodule(part), "hook")
    expected = model(images)
    for block in model.blocks:
        block.implementation = "triton"
    assert torch.allclose(model.to(triton_device)(images.to(triton_device)).cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["mc_vit_4_4_32", "vit_tiny_patch16_224"])
def test_a_kernel_is_refused_to_a_model_that_has_them(name: str, part: str) -> None:
    model = timm.create_model(name, depth=1, img_size=32, patch_size=8, embed_dim=48, num_heads=4)
    change(model.blocks[0].get_submodule(part), "hook")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(
        UserError, match="--block cpp does not support layers with adapters or hooks; use --block torch"
    ):
        set_block(model, "cpp")
    assert [type(module) for module in model.modules()] == kinds

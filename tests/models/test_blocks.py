"""How our models and timm's compute their blocks: the same weights and results, and what is refused."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fastvit_kernels.cpp import block as cpp
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models import build_model, check_block, set_block
from fastvit_train.utils.errors import UserError
from tests.kernels.accuracy import assert_accurate, logits_and_gradients
from tests.support import rgb

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


def build(name: str, **options: Any) -> nn.Module:
    model = timm.create_model(name, **{**TINY, **options})
    for parameter in model.parameters():  # so that no branch is negligible
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mc_vit_4_4_32", "c_vit_4_4_32"])
def test_logits_and_gradients_are_those_of_torchs_operators(name: str, triton_device: str, seed: int) -> None:
    model, images = build(name).to(triton_device), torch.randn(3, 3, 32, 32, device=triton_device)
    names = list(model.state_dict())
    exact = logits_and_gradients(copy.deepcopy(model).double(), images.double(), lambda logits: logits.square().sum())
    baseline = logits_and_gradients(model, images, lambda logits: logits.square().sum())
    set_block(model, "triton")
    called = []
    model.blocks[0].mlp.register_forward_hook(lambda *args: called.append(args))
    results = logits_and_gradients(model, images, lambda logits: logits.square().sum())
    for each in zip(results, baseline, exact, strict=True):
        assert_accurate(*each)
    assert not called and list(model.state_dict()) == names
    set_block(model, "torch")
    again = logits_and_gradients(model, images, lambda logits: logits.square().sum())
    assert called and torch.equal(again[0][0], baseline[0][0])


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(triton_device: str, seed: int) -> None:
    model, images = build("mc_vit_4_4_32").to(triton_device), torch.randn(2, 3, 32, 32, device=triton_device)
    set_block(model, "triton")

    def gradients() -> list[Tensor]:
        return logits_and_gradients(model, images, lambda logits: logits.square().sum())[1]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"embed_dim": 72}, r"more than 64 channels \(embed_dim 72\)"),
        ({"drop_rate": 0.1}, r"dropout \(drop_rate 0.1\)"),
        ({"drop_path_rate": 0.1}, "stochastic depth"),
        ({"model": "vit_lite_7_4_32"}, "embed_dim 256.*stochastic depth.*residual_norm"),
        ({"model": "vit_tiny_patch16_224", "attention": "timm"}, "VisionTransformer, only our own models"),
    ],
)
def test_models_that_the_kernel_does_not_support_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        build_model(ModelConfig(**{"attention": "fused", "depth": 2, **options}, block="triton"), rgb(32), 10)
    assert str(raised.value).endswith("use --block torch") and "\n" not in str(raised.value)


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"MLP implementation 'triton' needs a GPU.*; available here: torch"):
        check_block(ModelConfig(block="triton"))
    check_block(ModelConfig(block="torch"))


def timms_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


@pytest.mark.slow
def test_timms_blocks_are_replaced_by_the_kernel_with_the_same_parameters(seed: int) -> None:
    timms = timms_vit(drop_path_rate=0.2).eval()
    ours, images = copy.deepcopy(timms), torch.randn(3, 3, 32, 32)
    parameters = {key: id(p) for key, p in ours.named_parameters()}
    set_block(ours, "cpp")
    assert {key: id(p) for key, p in ours.named_parameters()} == parameters
    assert list(ours.state_dict()) == list(timms.state_dict())
    assert not any(type(module).__module__ == "timm.models.vision_transformer" for module in ours.blocks)

    def compute(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return logits_and_gradients(model, images, lambda logits: logits.square().sum())

    called: list[nn.Module] = []
    for block in ours.blocks:
        block.mlp.register_forward_hook(lambda module, *_: called.append(module))
    exact = compute(copy.deepcopy(timms).double(), images.double())
    for each in zip(compute(ours, images), compute(timms, images), exact, strict=True):
        assert_accurate(*each)
    assert not called, "the blocks are composed from operators"
    assert [block.drop_path.keep_prob.item() for block in ours.blocks[1:]] == pytest.approx([0.8])
    set_block(ours, "cpp")  # again
    set_block(ours, "torch")
    for each in zip(compute(ours, images), compute(timms, images), exact, strict=True):
        assert_accurate(*each)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_values": 0.1}, "layer scale"),
        ({"proj_drop_rate": 0.1}, "dropout"),
        ({"qk_norm": True}, "VisionTransformer, only our own models and timm's plain Vision Transformers"),
        ({"act_layer": "relu"}, "another MLP than two linear layers with GELU"),
        ({"mlp_layer": timm.layers.SwiGLU}, "another MLP than two linear layers with GELU"),
        ({"embed_dim": 40}, "embed_dim 40 with MLPs of width 160 .multiples of 16 are supported."),
        ({"img_size": 128}, "257 tokens of 48 channels .up to 256 of 384 are supported."),
    ],
)
def test_blocks_of_timm_that_compute_something_else_are_refused(options: dict[str, Any], reason: str) -> None:
    model = timms_vit(**options)
    with pytest.raises(UserError, match=f"--block cpp does not support {reason}; use --block torch"):
        set_block(model, "cpp")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "autocast"), [("mc_vit_4_4_32", True), ("cct_2_3x2_32", False)])
def test_a_compiled_model_with_the_kernel_computes_what_it_does_eagerly(
    name: str, autocast: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_dropout = {"drop_path_rate": 0.0, "attn_drop_rate": 0.0, "drop_rate": 0.0}
    model = timm.create_model(name, embed_dim=48, num_heads=4, depth=2, **no_dropout)
    images, exact_model = torch.randn(4, 3, 32, 32), copy.deepcopy(model).double()

    def compute(model: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and images.dtype == torch.float32):
            return logits_and_gradients(model, images, lambda logits: logits.float().square().sum())

    exact = compute(exact_model, images.double())
    set_block(model, "cpp")
    eager = compute(model, images)
    prepare, called = cpp._prepare, []
    monkeypatch.setattr(cpp, "_prepare", lambda *args: called.append(args) or prepare(*args))
    results = compute(torch.compile(model, fullgraph=True), images)
    assert len(called) == 4  # two blocks, forward and backward
    for each in zip(results, eager, exact, strict=True):
        assert_accurate(*each)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_model_has_only_torchs_operators(strict: bool, seed: int) -> None:
    model, images = timm.create_model("mc_vit_4_4_32", depth=1).eval(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    set_block(model, "cpp")
    program = torch.export.export(model, (images,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called and not [name for name in called if "fastvit" in name]
    torch.testing.assert_close(program.module()(images), expected)

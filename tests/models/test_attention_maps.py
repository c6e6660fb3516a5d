"""What a model looks at: against the attention that torch's own module tells, and by what must hold of it."""

import pytest
import timm
import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.models import attention_maps, patch_filters, position_similarity, set_attention, set_block
from fastvit_train.utils.errors import UserError

SERVING = [name for name, reason in fastvit_kernels.implementations().items() if reason is None and name != "triton"]


def trained_looking(name: str, **sizes: object) -> nn.Module:
    """A model whose weights are large enough for its attention to be far from even."""
    model = timm.create_model(name, **sizes).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)
    return model


def torchs_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Each layer's attention probabilities, (batch, heads, tokens, tokens), by torch.nn.MultiheadAttention, float64."""
    found: list[Tensor] = []

    def hear(module: fastvit_kernels.SelfAttention, args: tuple[Tensor]) -> None:
        x = args[0].double()
        oracle = nn.MultiheadAttention(x.shape[-1], module.num_heads, batch_first=True, dtype=torch.float64)
        oracle.in_proj_weight.data = module.qkv.weight.detach().double()
        oracle.in_proj_bias.data = (
            torch.zeros(3 * x.shape[-1]).double() if module.qkv.bias is None else module.qkv.bias.detach().double()
        )
        found.append(oracle(x, x, x, need_weights=True, average_attn_weights=False)[1].detach())

    hooks = [block.attn.register_forward_pre_hook(hear) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


QUICK = {"compiled": (), "cpp": ("mc_vit_4_4_32",)}
"""the models that are compiled without `-m slow`"""


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=() if name in QUICK.get(attention, (name,)) else pytest.mark.slow)
        for name in ("c_vit_4_4_32", "mc_vit_4_4_32", "cct_2_3x2_32")
        for attention in SERVING
    ],
)
def test_every_implementation_is_looked_into_alike(name: str, attention: str, seed: int) -> None:
    model, images = trained_looking(name), torch.randn(2, 3, 32, 32)
    wanted = torchs_weights(model, images)
    assert max(layer.max() for layer in wanted) > 3 / wanted[0].shape[-1], "even attention would prove little"
    set_attention(model, attention)
    looks = attention_maps(model, images)
    for found, expected in zip(looks.attention, wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_a_model_whose_blocks_are_one_kernel_is_looked_into_alike(seed: int) -> None:
    model, images = trained_looking("mc_vit_4_4_32"), torch.randn(2, 3, 32, 32)
    wanted = torchs_weights(model, images)
    set_block(model, "cpp")
    for found, expected in zip(attention_maps(model, images).attention, wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    assert all(block.implementation == "cpp" for block in model.blocks)


def test_the_class_token_is_what_reads(seed: int) -> None:
    model, images = trained_looking("c_vit_4_4_32"), torch.randn(2, 3, 32, 32)
    looks, wanted = attention_maps(model, images), torchs_weights(model, images)
    assert looks.grid == (8, 8) and looks.pooling == "the class token's attention"
    row = wanted[-1].mean(1)[:, 0, 1:].unflatten(-1, (8, 8)).float()
    torch.testing.assert_close(looks.pooled, row, atol=2e-5, rtol=0)
    torch.testing.assert_close(looks.layer_maps(1)[0, 2], wanted[1][0, 2, 0, 1:].view(8, 8).float(), atol=2e-5, rtol=0)
    followed = torch.eye(65, dtype=torch.float64).expand(2, 65, 65)
    for layer in wanted:
        followed = (0.5 * layer.mean(1) + 0.5 * torch.eye(65)) @ followed
    torch.testing.assert_close(looks.rollout.flatten(1).double(), followed[:, 0, 1:], atol=2e-5, rtol=0)


def test_sequence_pooling_shows_its_weights(seed: int) -> None:
    """The weights shown, applied to the last tokens, are the features that the classifier reads."""
    model, images = trained_looking("mc_vit_4_4_32"), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.attention_pool.weight)
    looks = attention_maps(model, images)
    assert looks.pooling == "pooling weights" and looks.pooled.max() > 2 / 64
    with torch.no_grad():
        tokens = model.forward_features(images)
        read = (looks.pooled.flatten(1)[:, None] @ tokens).squeeze(1)
        torch.testing.assert_close(read, model.forward_head(tokens, pre_logits=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(looks.rollout.flatten(1).sum(1), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pool", "readers"), [("token", slice(0, 1)), ("avg", slice(5, None))])
def test_models_of_timms_are_looked_into(pool: str, readers: slice, seed: int) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, global_pool=pool, reg_tokens=4, depth=2).eval()
    set_attention(model, "fused")
    looks = attention_maps(model, torch.randn(1, 3, 64, 64))
    assert looks.grid == (4, 4) and looks.readers == readers and looks.attention[0].shape == (1, 3, 21, 21)
    similarity = position_similarity(model)
    assert similarity is not None and similarity.shape == (4, 4, 4, 4)


def test_nothing_of_the_model_stays_changed(seed: int) -> None:
    model = trained_looking("mc_vit_4_4_32")
    attention_maps(model, torch.randn(1, 3, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_can_not_be_looked_at_is_said() -> None:
    with pytest.raises(UserError, match="ResNet is not a plain vision transformer"):
        attention_maps(timm.create_model("resnet18"), torch.zeros(1, 3, 32, 32))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="map")
    set_attention(model, "fused")
    with pytest.raises(UserError, match="pools its tokens by 'map'"):
        attention_maps(model, torch.zeros(1, 3, 32, 32))


def test_positions_and_filters() -> None:
    model = timm.create_model("c_vit_4_4_32")
    with torch.no_grad():
        model.pos_embed[0, 1 + 9] = model.pos_embed[0, 1 + 30] = torch.arange(48.0)
    similarity = position_similarity(model)
    assert similarity is not None
    assert similarity[1, 1, 3, 6] == pytest.approx(1, abs=1e-6) and abs(similarity[0, 0, 3, 6]) < 0.9
    assert similarity[2, 5, 2, 5] == pytest.approx(1, abs=1e-6)
    filters = patch_filters(model)
    assert filters is not None and filters.shape == (48, 3, 4, 4)
    norms = filters.flatten(1).norm(dim=1)
    assert norms.equal(norms.sort(descending=True).values)

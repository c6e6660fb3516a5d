"""Peers' checkpoints load and give the peers' logits."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastvit_train  # noqa: F401 registers the models
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import ModelConfig
from fastvit_train.models import build_model
from fastvit_train.utils.errors import UserError
from tests.models.reference import compact_logits, compact_state, seed_logits, seed_state
from tests.support import rgb

COMPACT = {
    # name: (depth, dim, hidden, tokens, convs, cls, heads)
    "vit_lite_7_4_32": (7, 256, 512, 64, 0, True, 4),
    "cvt_7_4_32": (7, 256, 512, 64, 0, False, 4),
    "cct_2_3x2_32": (2, 128, 128, 64, 2, False, 2),
    "cct_7_3x1_32": (7, 256, 512, 256, 1, False, 4),
}


def load(name: str, state: dict[str, Tensor], tmp_path: Path, suffix: str, **options: object) -> torch.nn.Module:
    path = tmp_path / f"peer{suffix}"
    if suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)
    return model.eval()


def assert_same_logits(ours: Tensor, exact: Tensor) -> None:
    """The bound is the issue's 1e-5, on logits of order 1."""
    scale = max(1.0, float(exact.abs().max()))
    assert (ours.double() - exact).abs().max() / scale < 1e-5


@pytest.mark.parametrize("merged", [False, True], ids=["per-head", "merged"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_seed_weights_give_the_seeds_logits(seed: int, tmp_path: Path, merged: bool, bias: bool) -> None:
    state = seed_state(merged=merged, bias=bias)
    images = torch.randn(5, 3, 32, 32)
    exact = seed_logits({k: v.double() for k, v in state.items()}, images.double(), depth=4, num_heads=4)
    model = load("c_vit_4_4_32", state, tmp_path, ".pth", qkv_bias=bias)
    with torch.no_grad():
        assert_same_logits(model(images), exact)


@pytest.mark.parametrize("name", COMPACT)
def test_compact_weights_give_the_compact_familys_logits(seed: int, tmp_path: Path, name: str) -> None:
    depth, dim, hidden, tokens, convs, cls, heads = COMPACT[name]
    state = compact_state(depth, dim, hidden, tokens, convs, cls)
    images = torch.randn(3, 3, 32, 32)
    exact = compact_logits({k: v.double() for k, v in state.items()}, images.double(), depth, heads)
    model = load(name, state, tmp_path, ".safetensors")
    with torch.no_grad():
        assert_same_logits(model(images), exact)


@pytest.mark.parametrize("name", ["c_vit_4_4_32", *COMPACT])
def test_published_weights_are_adapted_to_gray_images(seed: int, tmp_path: Path, name: str) -> None:
    gray = torch.randn(3, 1, 32, 32)
    images = gray.double().expand(-1, 3, -1, -1)
    if name in COMPACT:
        depth, dim, hidden, tokens, convs, cls, heads = COMPACT[name]
        state = compact_state(depth, dim, hidden, tokens, convs, cls)
        exact = compact_logits({k: v.double() for k, v in state.items()}, images, depth, heads)
    else:
        state = seed_state()
        exact = seed_logits({k: v.double() for k, v in state.items()}, images, depth=4, num_heads=4)
    save_file({key: value.contiguous() for key, value in state.items()}, path := tmp_path / "theirs.safetensors")
    config = ModelConfig(name, weights=str(path), in_chans=1)
    with torch.no_grad():
        assert_same_logits(build_model(config, InputSize(1, 32, 32), 10).eval()(gray), exact)


def test_an_mc_vit_of_the_seed_loads_whatever_its_new_layers_are_called(seed: int) -> None:
    model = timm.create_model("mc_vit_4_4_32").eval()
    state = seed_state()
    state["embedding.position_embeddings"] = state["embedding.position_embeddings"][:, 1:]
    del state["embedding.cls_token"]
    pooling, norm = torch.randn(1, 48), torch.randn(48)
    state |= {"pool.score.weight": pooling, "pool.score.bias": torch.zeros(1)}
    state |= {"encoder.last_norm.weight": norm, "encoder.last_norm.bias": torch.zeros(48)}
    from fastvit_train.models.convert import checkpoint_filter_fn

    model.load_state_dict(checkpoint_filter_fn(state, model))
    assert torch.equal(model.attention_pool.weight, pooling)
    assert torch.equal(model.norm.weight, norm)


@pytest.mark.parametrize("wrapping", ["state_dict", "model", "model_state_dict"])
def test_weights_flag_loads_wrapped_files_and_resets_a_head_of_other_classes(
    seed: int, tmp_path: Path, wrapping: str
) -> None:
    state = seed_state()
    path = tmp_path / "peer.pth"
    torch.save({"epoch": 3, wrapping: {f"module.{key}": value for key, value in state.items()}}, path)
    config = ModelConfig(model="c_vit_4_4_32", weights=str(path))
    same = build_model(config, input_size=rgb(32), num_classes=10)
    assert torch.equal(same.head.weight, state["classifier.weight"])
    other = build_model(config, input_size=rgb(32), num_classes=100)
    assert other.head.weight.shape == (100, 48)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, state["encoder.blocks.0.mlp.dense_1.weight"])


def test_positions_are_resampled_for_another_image_size(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "peer.pth"
    torch.save(seed_state(), path)
    model = build_model(ModelConfig(model="c_vit_4_4_32", weights=str(path)), input_size=rgb(64), num_classes=10)
    assert model.pos_embed.shape == (1, 1 + 16 * 16, 48)


@pytest.mark.parametrize("num_classes", [100, 10])
def test_timms_route_keeps_the_classifier_that_fits(seed: int, tmp_path: Path, num_classes: int) -> None:
    state = compact_state(2, 128, 128, 64, 2, False)
    state |= {"classifier.fc.weight": torch.randn(100, 128), "classifier.fc.bias": torch.randn(100)}
    model = load("cct_2_3x2_32", state, tmp_path, ".pth", num_classes=num_classes)
    assert model.head.weight.shape == (num_classes, 128)
    assert torch.equal(model.head.weight, state["classifier.fc.weight"]) == (num_classes == 100)


@pytest.mark.parametrize("content", [[1], torch.zeros(3), None, {"model": 5}, {3: torch.zeros(2)}, {"a": 1}], ids=repr)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth cannot be read as weights"):
        build_model(ModelConfig(weights=str(tmp_path / "bad.pth")), input_size=rgb(32), num_classes=10)


@pytest.mark.parametrize("name", ["mc_vit_4_4_32", "cvt_7_4_32", "cct_2_3x2_32"])
def test_weights_of_a_model_with_other_tokens_are_refused(seed: int, tmp_path: Path, name: str) -> None:
    torch.save(seed_state(), tmp_path / "peer.pth")
    with pytest.raises(UserError, match="does not fit the model"):
        build_model(ModelConfig(model=name, weights=str(tmp_path / "peer.pth")), input_size=rgb(32), num_classes=10)
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_model(
            ModelConfig(model=name, weights=str(tmp_path / "bad.safetensors")), input_size=rgb(32), num_classes=10
        )


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04"], ids=["empty", "text", "zip"])
def test_files_that_hold_no_weights_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pth cannot be read as weights"):
        build_model(ModelConfig(weights=str(path)), input_size=rgb(32), num_classes=10)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = tmp_path / "evil.pth"
    torch.save({"x": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_model(ModelConfig(weights=str(path)), input_size=rgb(32), num_classes=10)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model_are_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "peer.pth"
    torch.save(seed_state(depth=2), path)
    with pytest.raises(UserError, match="does not fit the model"):
        build_model(ModelConfig(model="c_vit_4_4_32", weights=str(path)), input_size=rgb(32), num_classes=10)

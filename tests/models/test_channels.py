"""Models of gray images, also from the weights of models of color images, and the other way around."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.models import build_model
from fastvit_train.models.resolve import resolve
from fastvit_train.utils.errors import UserError

NAMES = ["mc_vit_4_4_32", "cct_2_3x2_32", "vit_tiny_patch16_224", "resnet10t"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adapted_weights_give_the_same_logits_for_gray_images(
    name: str, channels: int, tmp_path: Path, seed: int
) -> None:
    size = {"img_size": 32} if name != "resnet10t" else {}
    trained = timm.create_model(name, num_classes=10, in_chans=4 - channels, **size).eval()
    save_file(trained.state_dict(), path := tmp_path / "model.safetensors")
    attention = "auto" if name in NAMES[:2] else "timm"
    config = ModelConfig(name, attention, weights=str(path), in_chans=channels)  # type: ignore[arg-type]
    model = build_model(config, InputSize(channels, 32, 32), 10).eval()
    gray = torch.randn(16, 1, 32, 32)  # of three, one logit may hardly vary by chance
    logits = trained(gray.expand(-1, 4 - channels, -1, -1))
    torch.testing.assert_close(model(gray.expand(-1, channels, -1, -1)), logits, rtol=1e-4, atol=1e-5)
    assert logits.std(0).min() > 1e-4, "the images make a difference"


def test_a_mean_of_colors_becomes_that_of_gray_levels() -> None:
    def normalization(**settings: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
        model = ModelConfig(model="vit_lite_7_4_32", **settings)  # type: ignore[arg-type]
        config = resolve(TrainConfig(model=model))
        assert config.mean == tuple(build_model(model, config.input_size, 10).pretrained_cfg["mean"])  # type: ignore
        return config.mean, config.std

    assert normalization() == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    mean, std = normalization(in_chans=1)
    assert mean == pytest.approx([0.299 * 0.4914 + 0.587 * 0.4822 + 0.114 * 0.4465])
    assert len(std) == 1 and 0.2435 < std[0] < 0.2616
    assert normalization(in_chans=1, mean=(0.5,), std=(0.25,)) == ((0.5,), (0.25,))
    with pytest.raises(UserError, match="--mean has 3 numbers, but the input has 1 channel; give a number for each"):
        normalization(in_chans=1, mean=(0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="--std has 1 number, but the input has 3 channels"):
        normalization(std=(0.5,))

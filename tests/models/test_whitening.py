"""--patch-init whiten: tokens start uncorrelated, the same on every process, and only where it can be done."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import DatasetSpec, Split
from fastvit_train.data.inputs import build_preprocess
from fastvit_train.models import whiten_patches, whitening
from fastvit_train.models.resolve import resolve
from fastvit_train.models.whitening import FLOOR, STD
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.support import write_folder


def correlated(count: int) -> torch.Tensor:
    """Images whose neighbouring pixels are alike, as in pictures."""
    coarse = torch.randn(count, 3, 9, 9)
    return torch.nn.functional.interpolate(coarse, 32, mode="bilinear") + 0.3 + 0.05 * torch.randn(count, 3, 32, 32)


def test_tokens_are_centred_uncorrelated_and_of_one_size(seed: int) -> None:
    model, images = timm.create_model("mc_vit_4_4_32"), correlated(400)
    whiten_patches(model, images)
    with torch.no_grad():
        tokens = model.patch_embed(images).flatten(0, 1).double()
    assert tokens.mean(0).abs().max() < 1e-3 * STD
    covariance = torch.cov(tokens.T)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    assert off_diagonal.abs().max() < 1e-3 * STD**2
    assert covariance.diagonal().max() <= STD**2 and covariance.diagonal()[0] > STD**2 / (1 + 2 * FLOOR)


def test_the_images_are_of_all_classes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is read one class after another; here the first class has black images."""
    monkeypatch.setattr(whitening, "MAX_SAMPLES", 100)
    black, pictures = torch.zeros(100, 3, 32, 32), correlated(300)
    images = torch.cat((black, pictures.clamp(-2, 2).sub(-2).mul(63))).to(torch.uint8)
    split = Split(images, torch.arange(4).repeat_interleave(100))
    config, model = resolve(TrainConfig()), timm.create_model("mc_vit_4_4_32")
    whitening.whiten(model, config, DatasetSpec("test", ("a", "b", "c", "d"), split, split))
    with torch.no_grad():
        tokens = model.patch_embed(build_preprocess(config, torch.device("cpu"))(images)).flatten(0, 1)
    assert tokens.std(0)[0].item() == pytest.approx(STD, rel=0.2) and tokens.std(0).max() < 1.2 * STD


def test_channels_beyond_the_directions_stay_random(seed: int) -> None:
    model = timm.create_model("mc_vit_4_4_32", patch_size=2, embed_dim=48)
    before = model.patch_embed.proj.weight.detach().clone()
    whiten_patches(model, correlated(20))
    after = model.patch_embed.proj.weight
    assert torch.equal(after[12:], before[12:]) and not torch.equal(after[:12], before[:12])


def test_it_is_for_models_that_cut_patches(seed: int) -> None:
    with pytest.raises(UserError, match="--patch-init whiten needs one of our models with a patch projection"):
        whiten_patches(timm.create_model("cct_2_3x2_32"), correlated(2))


@pytest.mark.slow
def test_a_run_starts_from_it(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = {"lr": 0.0, "epochs": 1, "weight_decay": 0.0}
    fit(small_config(exp_name="random", **settings))
    fit(small_config(exp_name="whiten", patch_init="whiten", **settings))
    weights = [
        timm.models.load_state_dict(str(tmp_path / "runs" / name / "model.safetensors"))
        for name in ("random", "whiten")
    ]
    changed = {key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])}
    assert changed == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.slow
def test_a_resumed_run_may_stream_its_images(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos")
    settings = {"patch_init": "whiten", "dataset": "folder", "data_dir": str(tmp_path / "photos"), "batch_size": 8}
    fit(small_config(exp_name="whole", **settings))
    fit(small_config(exp_name="parts", stop_after=1, **settings))
    fit(small_config(exp_name="parts", stream="always", **settings), resume="must")
    whole, parts = (
        timm.models.load_state_dict(str(tmp_path / "runs" / name / "model.safetensors")) for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_it_can_not_go_with_is_refused(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos")
    folder = {"dataset": "folder", "data_dir": str(tmp_path / "photos"), "stream": "always"}
    with pytest.raises(UserError, match="--patch-init whiten needs the images in memory"):
        fit(small_config(patch_init="whiten", **folder))
    with pytest.raises(UserError, match="from --weights some.pth; give --patch-init random"):
        resolve(small_config(patch_init="whiten", weights="some.pth"))
    assert not (tmp_path / "runs").exists()

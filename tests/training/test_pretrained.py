"""--pretrained: training starts from published weights, with their sizes and normalization."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from fastvit_train.config.schema import DataConfig, ModelConfig, TrainConfig
from fastvit_train.inference.trained_model import load_run
from fastvit_train.models.pretrained import source
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.loop import train
from fastvit_train.utils.errors import UserError
from tests.inference.fake_hub import FakeHub, Repo, fake_hub, use_hub

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
COMMON: dict[str, Any] = {"epochs": 1, "lr": 0.0, "batch_size": 360, "attention": "fused"}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """The folder of a run, which timm can load too; no size is the default one."""
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2, "qkv_bias": False}
    rendering = {"mean": MEAN, "std": STD, "crop_pct": 0.9}
    train(runs_dir=str(tmp_path / "runs"), exp_name="first", pos_embed="sine", **rendering, **sizes, **COMMON)
    return tmp_path / "runs" / "first"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder that timm wrote, of one of its own models with a normalization of its own."""
    model = timm.create_model("test_vit", num_classes=7)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD, "crop_pct": 0.8}
    save_for_hf(model, str(tmp_path / "theirs"), safe_serialization=True)
    return tmp_path / "theirs"


def resolved_model(model: ModelConfig) -> ModelConfig:
    return source.resolve_source(TrainConfig(model=model)).model


def same_but_for_the_classifier(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    names = {name for name in first if not name.startswith("head.") and name != "pos_embed"}
    assert names and first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.slow
def test_a_folder_of_our_own(ours: Path, tmp_path: Path) -> None:
    train(model=f"local-dir:{ours}", pretrained=True, runs_dir=str(tmp_path / "runs"), exp_name="next", **COMMON)
    config, before = RunFolder(tmp_path / "runs" / "next").read_config(), RunFolder(ours).read_config()
    for name in ("model", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "pos_embed"):
        assert config[name] == before[name], name
    assert config["mean"] == list(MEAN) and config["crop_pct"] is None, "the digits are not cropped"
    assert config["weights"] == str(ours / "model.safetensors")
    tuned = tmp_path / "runs" / "next"
    assert same_but_for_the_classifier(load_file(tuned / "model.safetensors"), load_file(ours / "model.safetensors"))
    shutil.rmtree(ours)
    assert load_run(tuned).normalisation == (MEAN, STD)


@pytest.mark.slow
def test_a_folder_of_timm_with_another_size_and_other_classes(theirs: Path, tmp_path: Path) -> None:
    settings = {**COMMON, "attention": "timm", "runs_dir": str(tmp_path / "runs")}
    train(model=f"local-dir:{theirs}", pretrained=True, image_size=32, exp_name="next", **settings)
    tuned = load_run(tmp_path / "runs" / "next")
    assert tuned.architecture == "test_vit" and tuned.input_size.image_size == 32 and tuned.num_classes == 10
    assert tuned.normalisation == (MEAN, STD) == (tuned.config.mean, tuned.config.std)
    assert json.loads((tuned.folder / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 1.0
    weights = load_file(theirs / "model.safetensors")
    assert same_but_for_the_classifier(tuned.model.state_dict(), weights)
    assert tuned.model.pos_embed.shape[1] == 2 * 2 + 1 != weights["pos_embed"].shape[1]


def test_what_is_not_given_is_that_of_the_published_model(theirs: Path) -> None:
    config = resolved_model(ModelConfig(f"local-dir:{theirs}", pretrained=True, std=(0.7, 0.7, 0.7)))
    weights = str(theirs / "model.safetensors")
    assert config == ModelConfig(
        "test_vit", image_size=160, in_chans=3, mean=MEAN, std=(0.7, 0.7, 0.7), weights=weights
    )
    assert resolved_model(ModelConfig("test_vit")) == ModelConfig("test_vit")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 0.8),
        ({"crop_pct": 1.0}, 1.0),
        ({"fit": "pad"}, None),
        ({"fit": "stretch"}, None),
        ({"dataset": "hf:u/n"}, 0.8),
        ({"dataset": "cifar10"}, None),
    ],
)
def test_images_are_cropped_as_the_published_models_are(
    theirs: Path, given: dict[str, Any], expected: float | None
) -> None:
    model, data = ModelConfig(f"local-dir:{theirs}", pretrained=True), DataConfig(**{"dataset": "folder", **given})
    assert source.resolve_source(TrainConfig(model=model, data=data)).data.crop_pct == expected


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_models_that_record_how_they_pool(name: str, tmp_path: Path) -> None:
    save_for_hf(timm.create_model(name), str(tmp_path), safe_serialization=True)
    assert resolved_model(ModelConfig(f"local-dir:{tmp_path}", pretrained=True)).model == name


@pytest.mark.parametrize("model", ["hf-hub:timm/test_vit.r160_in1k", "test_vit", "test_vit.r160_in1k"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_models_of_the_hub(hub: FakeHub, theirs: Path, model: str, file: str) -> None:
    """A name of timm stands for the repository that timm lists for it."""
    repo = hub.repos["timm/test_vit.r160_in1k"] = Repo(private=False)
    repo.files["config.json"] = (theirs / "config.json").read_bytes()
    weights = load_file(theirs / "model.safetensors")
    if file == "pytorch_model.bin":
        torch.save(weights, theirs / file)
    repo.files[file] = (theirs / file).read_bytes()
    config = resolved_model(ModelConfig(model, pretrained=True))
    assert config.model == ("test_vit" if model.startswith("hf-hub:") else model)
    assert config.mean == MEAN and config.image_size == 160 and not config.pretrained
    assert Path(config.weights or "").name == file and Path(config.weights or "").read_bytes() == repo.files[file]


def change(folder: Path, **arguments: object) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["model_args"] = {**described.get("model_args", {}), **arguments}
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "local-dir:no/such"}, "no/such is neither a run nor a model folder from timm"),
        ({"model": "hf-hub:a b"}, "--model hf-hub:a b cannot be loaded: "),
        ({"model": "mc_vit_4_4_32"}, "--pretrained: the Hugging Face Hub has no weights for mc_vit_4_4_32$"),
        ({"model": "resnetx"}, "unknown model 'resnetx'"),
        ({"pretrained": False}, "names a pretrained model; add --pretrained to start from its weights"),
        ({"weights": "x.pth"}, "--pretrained brings its own weights; leave --weights x.pth out"),
        ({"patch_init": "whiten"}, "--patch-init whiten would overwrite the patch projection from --pretrained; give"),
        ({"depth": 3}, "does not fit the model"),
        ({"mean": (0.5, 0.5, 2)}, "--mean 2.* is out of range; allowed: at least 0, at most 1"),
    ],
    ids=[
        "no folder",
        "no name",
        "no weights",
        "no model",
        "no flag",
        "two sources",
        "whitened",
        "another depth",
        "mean",
    ],
)
def test_what_cannot_be_a_start_is_refused(
    theirs: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    common = {**COMMON, "attention": "timm", "model": f"local-dir:{theirs}", "runs_dir": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message):
        train(**{**common, "pretrained": True, **settings})
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_weights_or_with_arguments_that_are_no_settings_is_refused(theirs: Path) -> None:
    config = ModelConfig(f"local-dir:{theirs}", pretrained=True)
    change(theirs, reg_tokens=1, act_layer=None, in_chans=3)
    with pytest.raises(UserError, match="was built with reg_tokens=1, which no setting can repeat"):
        resolved_model(config)
    change(theirs, reg_tokens=None)
    save_file({}, theirs / "other.safetensors")
    (theirs / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights; it needs a file model.safetensors or pytorch_model.bin"):
        resolved_model(config)


def test_without_a_network_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="cannot be reached, and the model is not in the cache"):
        train(model="test_vit", pretrained=True, runs_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()

"""--init-from, --freeze and --layer-decay: a run that starts from another run's weights."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from fastvit_train.config.schema import OptimConfig, TrainConfig
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.loop import fit, train
from fastvit_train.training.optim.layers import freeze_first
from fastvit_train.training.optim.optimizer import build_optimizer
from fastvit_train.utils.errors import UserError
from tests.support import launch, one_line_error, rgb, run, write_folder

SmallConfig = Callable[..., TrainConfig]
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "attention": "fused", "batch_size": 240}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A finished run on the digits, which have ten classes."""
    train(runs_dir=str(tmp_path / "runs"), exp_name="source", epochs=1, mlp_ratio=2, **SMALL)
    return tmp_path / "runs" / "source"


@pytest.mark.slow
def test_a_run_starts_from_another_with_its_sizes(source: Path, tmp_path: Path) -> None:
    train(init_from=str(source), runs_dir=str(tmp_path / "runs"), exp_name="next", lr=0.0, epochs=1, attention="fused")
    ours, theirs = load_file(source.parent / "next" / "model.safetensors"), load_file(source / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = RunFolder(source.parent / "next").read_config()
    assert config["init_from"] == str(source) and config["embed_dim"] == 24 and config["mlp_ratio"] == 2
    assert f"initialized from {source}/model.safetensors" in (source.parent / "next" / "train.log").read_text()


@pytest.mark.slow
def test_other_classes_and_another_size_from_the_command_line(source: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes", per_class=4)
    flags = ["--recipe", "fast-cifar10", "--dataset", "folder", "--data-dir", data, "--init-from", source]
    flags += ["--runs-dir", source.parent, "--exp-name", "next", "--image-size", 48, "--epochs", 1, "--lr", 0]
    done = launch(*flags, "--attention", "fused")
    assert done.returncode == 0, done.stderr
    assert "another number of classes: its classifier is not loaded" in done.stderr
    tuned, first = load_run(source.parent / "next"), load_run(source)
    assert tuned.classes == ("circle", "square") and tuned.input_size == rgb(48) and first.input_size == rgb(32)
    ours, theirs = tuned.model.state_dict(), first.model.state_dict()
    assert ours["pos_embed"].shape[1] == 36 and theirs["pos_embed"].shape[1] == 16
    same = [name for name in theirs if name != "pos_embed" and not name.startswith("head.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in same)


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_weights_again(source: Path, tmp_path: Path) -> None:
    common = {"runs_dir": str(tmp_path / "runs"), "epochs": 2, "attention": "fused", "batch_size": 240}
    train(init_from=str(source), exp_name="whole", **common)
    train(init_from=str(source), exp_name="parts", stop_after=1, **common)
    (source / "model.safetensors").write_text("something else")
    train(init_from=str(source), exp_name="parts", resume="must", **common)
    whole, parts = (load_file(source.parent / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": "no/such/run"}, "--init-from no/such/run is not the folder of a run: config.yaml can't be read"),
        ({"weights": "other.pth"}, "brings its own weights; leave --weights other.pth out"),
        ({"pretrained": True}, "--pretrained brings its own weights; leave --init-from .*source out"),
        ({"embed_dim": 48}, "does not fit the model: .*24"),
        ({"model": "c_vit_4_4_32"}, "does not fit the model"),
        ({"patch_init": "whiten"}, "would overwrite the patch projection from --init-from .*source; give --patch-init"),
    ],
    ids=["nothing there", "two sources", "and pretrained", "another width", "another model", "whitened"],
)
def test_what_cannot_be_a_start_is_refused(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(**{"init_from": str(source), "runs_dir": str(tmp_path / "new"), "exp_name": "next", **settings})
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_written_over_the_run_that_it_starts_from(source: Path) -> None:
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is the run that would be written; give another --exp-name"):
        train(init_from=str(source), runs_dir=str(source.parent), exp_name="source", overwrite=True, attention="fused")
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_two_sources_and_an_unfinished_run_are_one_line_on_the_command_line(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvit_train", "--init-from", str(source), "--runs-dir", str(tmp_path / "new")]
    done = run([*command, "--weights", "other.pth"])
    assert done.returncode == 2 and "leave --weights other.pth out" in one_line_error(done.stderr)
    (source / "model.safetensors").unlink()
    done = run(command)
    assert done.returncode == 2 and "is not finished: it has no model.safetensors" in one_line_error(done.stderr)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "fused"},
        {"attention": "cpp", "block": "cpp"},
        {"attention": "fused", "optimizer": "sgd", "grad_checkpointing": True},
        {"attention": "fused", "optimizer": "adamw", "decay_all": True, "ema": 0.5, "pos_embed": "conv"},
    ],
    ids=["operators", "kernel", "checkpointing", "convolutions"],
)
def test_frozen_layers_keep_their_weights_and_all_others_change(
    small_config: SmallConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    fit(small_config(**settings, exp_name="start", epochs=1, lr=0.0))
    fit(small_config(**settings, exp_name="run", epochs=2, freeze=2, layer_decay=0.5))
    start, ended = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("start", "run"))
    frozen = [name for name in start if name.startswith(("patch_embed.", "pos_embed", "pos_convs.0.", "blocks.0."))]
    assert len(frozen) >= 14
    for name, value in start.items():
        # the softmax of the pooling removes the effect of its bias
        assert torch.equal(value, ended[name]) == (name in frozen) or name == "attention_pool.bias", name
    assert "of them are trained: 2 layers frozen" in (tmp_path / "runs" / "run" / "train.log").read_text()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nmuon", "decay all"])
def test_each_layer_has_its_share_of_the_learning_rate(optimizer: str) -> None:
    model = timm.create_model("mc_vit_conv_4_4_32", embed_dim=24)
    name, decay_all = ("adamw", True) if optimizer == "decay all" else (optimizer, False)
    config = OptimConfig(optimizer=name, lr=0.8, layer_decay=0.5, weight_decay=0.1, decay_all=decay_all)
    groups = build_optimizer(model, config).param_groups
    share = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    layers = {"patch_embed": 5, "blocks.0.": 4, "pos_convs.0.": 4, "blocks.3.": 1, "norm": 1, "attention_pool": 1}
    for parameter_name, parameter in model.named_parameters():
        for beginning, below in layers.items():
            if parameter_name.startswith(beginning):
                assert share[id(parameter)] == 0.5**below, parameter_name
        if parameter_name.startswith("head"):
            assert share[id(parameter)] == 1
        assert decays[id(parameter)] == (0.1 if decay_all or parameter.ndim > 1 else 0.0), parameter_name


@pytest.mark.slow
def test_the_schedule_scales_each_layer_and_the_highest_is_recorded(small_config: SmallConfig, tmp_path: Path) -> None:
    """With plain gradient descent, the first step of a layer is its share of what it would be."""
    plain = {"optimizer": "sgd", "weight_decay": 0.0, "lr": 0.1, "schedule": "constant", "warmup": 0.0}
    plain |= {"epochs": 1, "batch_size": 10**4, "crop": "none"}
    moved = {}
    for name, settings in (("start", {"lr": 0.0}), ("all", {}), ("decayed", {"layer_decay": 0.5})):
        fit(small_config(exp_name=name, **{**plain, **settings}))
        moved[name] = load_file(tmp_path / "runs" / name / "model.safetensors")
    below = [("patch_embed.proj", 3), ("blocks.0.attn.qkv", 2), ("blocks.1.mlp.fc1", 1), ("head", 0)]
    for name, count in below:
        whole, share = (moved[run][f"{name}.weight"] - moved["start"][f"{name}.weight"] for run in ("all", "decayed"))
        torch.testing.assert_close(share, whole * 0.5**count, rtol=1e-2, atol=1e-7)
    assert RunFolder(tmp_path / "runs" / "decayed").metrics.read_text().count('"learning_rate": 0.1,') == 1


@pytest.mark.slow
def test_a_run_with_frozen_layers_is_resumed_with_the_same_bits(small_config: SmallConfig, tmp_path: Path) -> None:
    settings = {"freeze": 1, "layer_decay": 0.7, "ema": 0.9, "cutmix": 1.0}
    fit(small_config(exp_name="whole", **settings))
    fit(small_config(exp_name="parts", stop_after=1, **settings))
    fit(small_config(exp_name="parts", **settings), resume="must")
    whole, parts = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_cannot_be_frozen_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--freeze 4 leaves nothing to train; allowed: at most 3, which is all but"):
        fit(small_config(freeze=4))
    with pytest.raises(UserError, match="statistics of its batch normalization would still change"):
        freeze_first(timm.create_model("resnet18"), 1)
    with pytest.raises(UserError, match="Linear does not support --freeze 1; omit it"):
        freeze_first(torch.nn.Linear(2, 2), 1)
    assert not (tmp_path / "runs").exists()

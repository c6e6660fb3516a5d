"""Settings: what overrides what, and what is refused."""

from pathlib import Path

import pytest
import yaml

from fastvit_train.cli.parser import base_config
from fastvit_train.config.overrides import differences, flatten, override, to_plain, validate
from fastvit_train.config.recipes import RECIPES, recipe
from fastvit_train.config.schema import TrainConfig
from fastvit_train.utils.errors import UserError


def test_setting_names_are_unique_over_the_sections() -> None:
    config = TrainConfig()
    sections = (config.run, config.model, config.data, config.optim)
    assert len(flatten(config)) == sum(len(vars(section)) for section in sections)


def test_the_upstream_recipes_are_the_upstreams() -> None:
    for name, dataset in (("upstream-cifar10", "cifar10"), ("upstream-cifar100", "cifar100")):
        settings = flatten(recipe(name))
        expected = {
            "dataset": dataset, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.01, "decay_all": True,
            "schedule": "constant", "warmup": 0.0, "batch_size": 256, "epochs": 100, "crop": "resized",
            "crop_scale": 0.8, "flip": "random", "label_smoothing": 0.0, "cutout": 0, "model": "mc_vit_4_4_32",
        }  # fmt: skip
        assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_say_their_own_name(name: str) -> None:
    config = recipe(name)
    validate(config)
    assert config.run.recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_configuration_reads_back_as_it_was(name: str) -> None:
    config = override(recipe(name), {"track": ["tensorboard"], "clip_grad": 1, "lr": "1e-3"}, "the test")
    assert override(TrainConfig(), yaml.safe_load(yaml.safe_dump(to_plain(config))), "the test") == config
    assert config.optim.lr == 1e-3 and isinstance(config.optim.clip_grad, float)


def test_recipe_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("recipe: fast-cifar10\nlr: 0.5\nbatch-size: 32\n")
    base, _ = base_config(["--config", str(file), "--lr", "0.25"])
    assert (base.run.recipe, base.optim.lr, base.run.batch_size, base.data.flip) == (
        "fast-cifar10",
        0.5,
        32,
        "alternating",
    )
    base, _ = base_config([f"--config={file}", "--recipe=upstream-cifar10"])
    assert (base.run.recipe, base.optim.lr, base.data.crop) == ("upstream-cifar10", 0.5, "resized")
    assert base_config([])[0] == recipe("quickstart")
    for spelling in ("in-chans", "in_chans"):
        file.write_text(f"{spelling}: 1\n")
        assert base_config(["--config", str(file), "--in-chans", "3"])[0].model.in_chans == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch' in f; did you mean epochs"),
        ({"zzz": 3}, "unknown key 'zzz' in f; allowed: recipe, exp_name"),
        ({"epochs": "many"}, "epochs: 'many' in f is not of type int"),
        ({"epochs": 1.5}, "epochs: 1.5 in f is not of type int"),
        ({"epochs": True}, "epochs: True in f is not of type int"),
        ({"epochs": None}, "epochs: None in f is not of type int"),
        ({"lr": [1]}, "lr: .* is not of type float"),
        ({"flip": "up"}, "flip: 'up' in f is not allowed; allowed: none, random, alternating"),
        ({"decay_all": "yes"}, "decay_all: 'yes' in f is not of type bool"),
        ({"track": ["visdom"]}, "track: 'visdom' in f is not allowed; allowed: tensorboard, wandb"),
        (
            {"dataset": "mnist"},
            "dataset: 'mnist' in f is not allowed .did you mean fashion-mnist..; allowed: digits",
        ),
    ],
)
def test_bad_keys_and_values(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(TrainConfig(), settings, "f")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0), ("batch_size", -1), ("grad_accum", 0), ("lr", -0.1), ("lr", float("nan")), ("holdout", 1.0),
        ("warmup", 1.5), ("drop_rate", 1.0), ("label_smoothing", -0.1), ("crop_scale", 0.0), ("patch_size", 0),
        ("seed", -1), ("save_every", -5), ("clip_grad", -1.0), ("exp_name", "a/b"), ("exp_name", ".."),
    ],
)  # fmt: skip
def test_numbers_out_of_range(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')}"):
        validate(override(TrainConfig(), {key: value}, "f"))


def test_differences_name_what_changed_and_leave_out_what_may() -> None:
    saved = to_plain(recipe("quickstart"))
    assert differences(saved, {**saved, "lr": 0.5, "data_dir": "elsewhere"}) == [f"lr: {saved['lr']} -> 0.5"]

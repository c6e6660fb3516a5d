"""The tables of models and recipes say what is so, without a network, and in seconds."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit_train.cli.main import main
from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import RECIPES, recipe
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.models import OUR_MODELS, build_model
from fastvit_train.models.shapes import stages, tokens
from fastvit_train.profiling import catalog
from fastvit_train.profiling.roofline import count_flops
from fastvit_train.utils.safe_load import read_settings


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("this needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def rows(text: str) -> dict[str, list[str]]:
    """The words of each line by its first; a name's figures come before its description."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if words := line.split():
            found.setdefault(words[0], words[1:])
    return found


@pytest.mark.parametrize("name", ["c_vit_4_4_32", "cct_2_3x2_32"])
def test_what_is_told_without_weights_is_true_of_the_model(name: str) -> None:
    entry = catalog.describe(name)
    model = build_model(ModelConfig(name), 32, 10).eval()
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert entry.tokens == tokens(stages(model, 32)) == {"c_vit_4_4_32": 65, "cct_2_3x2_32": 64}[name]
    with torch.no_grad():
        assert entry.flops == count_flops(lambda: model(torch.zeros(1, 3, 32, 32))) > 1e6


def test_models_by_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--no-measure"])
    found = rows(capsys.readouterr().out)
    assert set(OUR_MODELS) <= set(found)
    assert found["mc_vit_4_4_32"] == ["119,147", "64", "17.6"]
    assert found["cct_7_3x1_32"][:2] == ["3,760,139", "256"]


def test_timms_models_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--pattern", "resnet18*", "--no-measure"])
    found = rows(capsys.readouterr().out)
    assert found["resnet18"][:2] == ["11,181,642", "-"] and "resnet18d" in found and "mc_vit_4_4_32" not in found


def test_speeds_are_measured_and_said_how(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--pattern", "c_vit_4_4_*"])
    out = capsys.readouterr().out
    training, inference = (float(rate.replace(",", "")) for rate in rows(out)["c_vit_4_4_32"][-2:])
    assert 0 < training < inference
    said = " ".join(out.split())
    assert re.search(
        r"training step .AdamW. and of inference.*in turn.*batch \d+, fp32, attention fused.*threads", said
    )


def test_recipes_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    out = capsys.readouterr().out
    found = rows(out)
    assert set(RECIPES) <= set(found) and max(map(len, out.splitlines())) <= 80
    assert found["fast-cifar10"] == ["mc_vit_4_4_32", "cifar10", "6", "128", "nmuon", "119,147", "17.6"]
    assert found["upstream-cifar100"][-2] == "123,557"  # with a hundred classes
    assert "a first run within a minute or two" in " ".join(out.split())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_as_config_takes_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", name])
    file = tmp_path / "my.yaml"
    file.write_text(capsys.readouterr().out)
    assert override(TrainConfig(), read_settings(file), "it") == recipe(name)

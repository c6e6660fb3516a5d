"""The tables of models and recipes are correct, and need no network."""

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
from tests.support import rgb


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("nothing here may connect to a network")

    monkeypatch.setattr(socket.socket, "connect", fail)


def rows(text: str) -> dict[str, list[str]]:
    """Split each line into words, by the first of them; a name's numbers come before its description."""
    table: dict[str, list[str]] = {}
    for line in text.splitlines():
        if words := line.split():
            table.setdefault(words[0], words[1:])
    return table


@pytest.mark.parametrize("name", ["c_vit_4_4_32", "cct_2_3x2_32"])
def test_sizes_are_counted_without_weights(name: str) -> None:
    entry = catalog.describe(name)
    model = build_model(ModelConfig(name), rgb(32), 10).eval()
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert entry.tokens == tokens(stages(model, rgb(32))) == {"c_vit_4_4_32": 65, "cct_2_3x2_32": 64}[name]
    with torch.no_grad():
        assert entry.flops == count_flops(lambda: model(torch.zeros(1, 3, 32, 32))) > 1e6


@pytest.mark.slow
def test_models_by_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--no-measure"])
    table = rows(capsys.readouterr().out)
    assert set(OUR_MODELS) <= set(table)
    assert table["mc_vit_4_4_32"] == ["119,147", "64", "17.6"]
    assert table["cct_7_3x1_32"][:2] == ["3,760,139", "256"]


def test_timms_models_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--pattern", "resnet18*", "--no-measure"])
    table = rows(capsys.readouterr().out)
    assert table["resnet18"][:2] == ["11,181,642", "-"] and "resnet18d" in table and "mc_vit_4_4_32" not in table


def test_throughput_is_measured_and_the_method_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--pattern", "c_vit_4_4_*"])
    out = capsys.readouterr().out
    training, inference = (float(rate.replace(",", "")) for rate in rows(out)["c_vit_4_4_32"][-2:])
    assert 0 < training < inference
    text = " ".join(out.split())
    assert re.search(
        r"training steps .AdamW. and of inference.*interleaved.*batch \d+, fp32, attention fused.*threads?", text
    )


@pytest.mark.slow
def test_recipes_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    out = capsys.readouterr().out
    table = rows(out)
    assert set(RECIPES) <= set(table) and max(map(len, out.splitlines())) <= 80
    assert table["fast-cifar10"] == ["mc_vit_4_4_32", "cifar10", "4", "64", "119,147", "17.6"]
    assert table["upstream-cifar100"][-2] == "123,557"  # with a hundred classes
    assert "a first run of a minute or two" in " ".join(out.split())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_as_config_takes_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", name])
    file = tmp_path / "my.yaml"
    file.write_text(capsys.readouterr().out)
    assert override(TrainConfig(), read_settings(file), "it") == recipe(name)

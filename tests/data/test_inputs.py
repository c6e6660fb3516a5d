"""All ranks have the same kind of images, whatever memory each of them finds free."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.data import inputs
from fastvit_train.data.sources import folder
from fastvit_train.models.resolve import resolve
from tests.support import write_folder


@pytest.mark.parametrize("first_of_its_machine", [True, False])
@pytest.mark.parametrize("another_streams", [True, False])
def test_a_rank_streams_if_another_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_streams: bool, first_of_its_machine: bool
) -> None:
    monkeypatch.setattr(inputs.sync, "run_on_all_ranks", lambda accelerator, action: action())
    monkeypatch.setattr(inputs.sync, "first_of_ranks", lambda value: value or another_streams or None)
    images = 2 * 3 * 32 * 32 * 24  # more than a third of them, so that --stream auto would stream
    monkeypatch.setattr(folder, "free_memory", lambda: 10**9 if another_streams else images)
    settings = {"dataset": "folder", "data_dir": str(write_folder(tmp_path / "photos"))}
    config = resolve(override(recipe("quickstart"), settings, "the test"))
    rank: Any = SimpleNamespace(is_local_main_process=first_of_its_machine)
    dataset = inputs.load_data(config, rank)
    assert isinstance(dataset.train.images, torch.Tensor) != another_streams

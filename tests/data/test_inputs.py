"""All ranks have the same kind of images, whatever memory each of them finds free."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.data import inputs
from fastvit_train.models.resolve import resolve
from tests.support import write_folder


@pytest.mark.parametrize("resident", [True, False])
def test_a_rank_streams_if_rank_0_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    monkeypatch.setattr(inputs.sync, "run_on_all_ranks", lambda accelerator, action: action())
    monkeypatch.setattr(inputs.sync, "broadcast_from_rank0", lambda accelerator, action: resident)
    settings = {"dataset": "folder", "data_dir": str(write_folder(tmp_path / "photos"))}
    config = resolve(override(recipe("quickstart"), settings, "the test"))
    second_rank: Any = SimpleNamespace(is_local_main_process=False)
    dataset = inputs.load_data(config, second_rank)
    assert isinstance(dataset.train.images, torch.Tensor) == resident

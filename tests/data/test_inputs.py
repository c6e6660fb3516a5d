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

PLENTY, TIGHT = 10**9, 2 * 3 * 32 * 32 * 24
"""bytes of free memory; with the second, a rank that decides alone streams"""


@pytest.mark.parametrize(
    ("first_of_its_machine", "another_streams", "free", "streams"),
    [(True, True, PLENTY, True), (True, False, TIGHT, True), (False, True, PLENTY, True), (False, False, TIGHT, False)],
)
def test_a_rank_streams_if_another_does(
    first_of_its_machine: bool,
    another_streams: bool,
    free: int,
    streams: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs.sync, "run_on_all_ranks", lambda accelerator, action: action())
    monkeypatch.setattr(inputs.sync, "first_of_ranks", lambda value: value or another_streams or None)
    monkeypatch.setattr(folder, "free_memory", lambda: free)
    settings = {"dataset": "folder", "data_dir": str(write_folder(tmp_path / "photos"))}
    config = resolve(override(recipe("quickstart"), settings, "the test"))
    rank: Any = SimpleNamespace(is_local_main_process=first_of_its_machine)
    dataset = inputs.load_data(config, rank)
    assert isinstance(dataset.train.images, torch.Tensor) != streams

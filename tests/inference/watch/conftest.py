"""Folders of runs, and a server that lists them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.watch.server import WatchServer
from fastvit_train.runs.run_folder import RunFolder
from tests.support.watching import SECRET, SUMMARY, append, epoch, serving

Config = Callable[..., TrainConfig]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def make_run(runs: Path, small_config: Config) -> Callable[..., Path]:
    """`make_run(name, epochs, finished)` writes the folder of a run as a training would."""

    def make(name: str, epochs: int = 2, finished: bool = True, **settings: object) -> Path:
        folder = runs / name
        folder.mkdir(parents=True)
        RunFolder(folder).create(small_config(**settings))
        append(folder, *(epoch(number) for number in range(1, epochs + 1)))
        append(folder, *({"step": step, "loss": 2.0} for step in range(4 * epochs)), name="steps.jsonl")
        if finished:
            (folder / "summary.json").write_text(json.dumps({**SUMMARY, "epochs": epochs}))
        return folder

    return make


@pytest.fixture
def server(runs: Path) -> Iterator[WatchServer]:
    with serving(runs) as server:
        yield server

"""The umask holds for every file and folder that we write, although safetensors writes for the owner alone."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.export import export_run
from fastvit_train.inference.push import push_run
from fastvit_train.training.loop import fit


@pytest.fixture(
    params=[0o022, pytest.param(0o027, marks=pytest.mark.slow), pytest.param(0o002, marks=pytest.mark.slow)]
)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.slow
def test_the_umask_holds_for_every_file(
    umask: int, small_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, checkpoints, exports, the files for the Hub, and the cache of decoded images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "1.png")
    data = {"dataset": "folder", "data_dir": str(tmp_path / "photos"), "batch_size": 2, "save_model_every": 1}
    fit(small_config(**data, epochs=1))
    run = Path(small_config().run.runs_dir) / "run"
    for to in ("safetensors", "timm"):
        export_run(str(run), to, None)
    push_run(str(run), "me/model", dry_run=True)
    files = set()
    for path in [*(tmp_path / "runs").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path
        files.add(path.suffix if path.parent.name == "fastvit_train" else path.name)
    expected = {".safetensors", "model.safetensors", "model_epoch_1.safetensors", "optimizer.bin", ".lock", "README.md"}
    assert expected < files

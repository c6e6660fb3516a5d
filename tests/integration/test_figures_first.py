"""What was computed is printed before it is written, so that a folder that is read-only costs no figures."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvit_train.cli.main import main
from fastvit_train.config.schema import TrainConfig
from fastvit_train.profiling import speedups, step_profile
from fastvit_train.training import seeds
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import SaveError
from tests.support import one_line_error


def refuse(path: Path, text: str) -> None:
    raise OSError(30, "Read-only file system")


def test_eval_prints_its_figures_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(trained), "--output", "/dev/null/x"])
    out, err = capsys.readouterr()
    summary = json.loads((trained / "summary.json").read_text())
    assert re.search(
        rf"accuracy {summary['test_accuracy']:.2%} ± \d\.\d\d, balanced \d\d\.\d\d% ± \d\.\d\d, top-5", out
    )
    assert f"always the most frequent class {summary['majority_share']:.2%}" in out
    assert "by class" in out and "img/s" in out
    assert stop.value.code == 2 and "/dev/null/x cannot be written; choose another --output" in one_line_error(err)
    assert "written to" not in out


def test_compare_prints_its_table_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(trained), "--output", "/dev/null/x.png"])
    out, err = capsys.readouterr()
    for name in ("accuracy", "balanced accuracy", "always the most frequent class", "highest accuracy"):
        assert re.search(rf"^\S\s+{name}\s+\S\s+\d+\.\d\d%", out, re.MULTILINE), name
    assert "written to" not in out
    assert stop.value.code == 2 and "/dev/null/x.png cannot be written" in one_line_error(err)


@pytest.mark.slow
def test_several_seeds_print_their_table_first(
    small_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seeds, "write_atomically", refuse)
    with pytest.raises(SaveError, match=r"run-1seeds.json cannot be written \(Read-only file system\)"):
        seeds.fit_seeds(small_config(epochs=1), 1)
    out = capsys.readouterr().out
    assert "mean" in out[out.index("run-seed0") :] and "written to" not in out.splitlines()[-1]


@pytest.mark.slow
def test_a_profile_prints_its_figures_first(
    small_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    write = atomic_io.write_atomically
    monkeypatch.setattr(speedups, "list_variants", lambda session: [])
    monkeypatch.setattr(
        atomic_io, "write_atomically", lambda path, text: (refuse if path.name == "profile.json" else write)(path, text)
    )
    with pytest.raises(SaveError, match="profile cannot be written"):
        step_profile.profile_run(small_config(), 2, tmp_path / "profile")
    out = capsys.readouterr().out
    assert "forward" in out and "written to" not in out

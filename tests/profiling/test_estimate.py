"""--dry-run: the estimate agrees with the run that follows, and nothing is written."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from fastvit_train.cli.main import main
from fastvit_train.config.overrides import override
from fastvit_train.config.schema import TrainConfig
from fastvit_train.profiling.estimate import format_duration
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils.safe_load import read_settings
from tests.support import launch

SMALL = ["--depth", "2", "--embed-dim", "96", "--num-heads", "2", "--attention", "fused", "--optimizer", "adamw"]
SMALL += ["--batch-size", "240", "--epochs", "2", "--exp-name", "try", "--no-telemetry"]


@pytest.fixture(scope="module")
def dry_run_output(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The output of a dry run, and the files that it has left."""
    folder = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main(["--dry-run", *SMALL, "--average-last", "2"])
    return printed.getvalue(), list(folder.rglob("*"))


@pytest.mark.slow
def test_nothing_is_written(dry_run_output: tuple[str, list[Path]]) -> None:
    assert dry_run_output[1] == []


@pytest.mark.slow
def test_settings_shapes_and_disk_are_those_of_the_run(dry_run_output: tuple[str, list[Path]], tmp_path: Path) -> None:
    text, _ = dry_run_output
    settings = tmp_path / "my.yaml"
    settings.write_text(text.partition("--config takes them:\n")[2].partition("\n\n")[0])
    main(["--config", str(settings), "--runs-dir", str(tmp_path / "runs")])
    folder = RunFolder(tmp_path / "runs" / "try")
    ran = override(TrainConfig(), folder.read_config(), "the run")
    assert override(TrainConfig(), {**read_settings(settings), "runs_dir": ran.run.runs_dir}, "it") == ran

    checkpoints = list(folder.checkpoints.glob("step_*"))
    size = sum(path.stat().st_size for path in checkpoints[0].iterdir()) / 2**20
    expected = float(text.partition("checkpoints of ")[2].split()[0])
    assert 0.95 * size < expected < size + 0.1
    weights, disk = (float(re.search(words, text)[1]) for words in (r"weights of ([\d.]+)", r"disk +([\d.]+) MiB"))  # type: ignore[index]
    assert disk == pytest.approx(4 * expected + 2 * weights, abs=0.5)  # two, the best and a new one; the final and best

    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["input"] == ["3", "x", "32", "x", "32"] and rows["tokens"] == ["64"] and rows["logits"] == ["10"]
    assert rows["patch_embed"] == ["64", "x", "96", "4,704"]
    assert rows["blocks.0"][:6] == ["to", "blocks.1,", "each", "64", "x", "96"]
    model = (folder.root / "summary.json").read_text()
    assert f'"parameters": {rows["all"][0].replace(",", "")},' in model


@pytest.mark.slow
def test_memory_speed_and_time_are_printed(dry_run_output: tuple[str, list[Path]]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in dry_run_output[0].splitlines() if line.strip()}
    assert float(rows["memory"][0].replace(",", "")) > 50
    rate, epoch = float(rows["speed"][0].replace(",", "")), float(rows["time"][0])
    assert epoch > 5 * 240 / rate  # 1,438 images are five steps, followed by the evaluation
    assert rows["time"][-2:] == ["(2", "epochs)"]


@pytest.mark.slow
def test_an_existing_run_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--runs-dir", str(tmp_path), "--epochs", "1"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    main([*SMALL, "--runs-dir", str(tmp_path), "--dry-run"])
    assert "estimated from" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.21, "3.2 s"), (125, "2 min"), (7320, "2 h 2 min"), (99.99, "100.0 s")]
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.slow
def test_only_rank_0_of_two_prints(tmp_path: Path) -> None:
    done = launch("--dry-run", *SMALL, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("estimated from") == done.stdout.count("patch_embed") == 1
    assert "world size 2" in done.stdout and not list(tmp_path.iterdir())

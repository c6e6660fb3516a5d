"""Real processes, started as a user starts them."""

import json
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.utils import machine
from tests.support import ON_CPUS, ROOT, launch, one_line_error, write_folder
from tests.support.pages import commands

MODULE = "fastvit_train"
CORES = machine.usable_cores()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "steps.jsonl")]


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_two_processes_are_one_run_with_the_losses_of_one_process(tmp_path: Path) -> None:
    common = ("--runs-dir", tmp_path, "--stop-after", 1, "--drop-path-rate", 0)
    configs = ROOT / "accelerate_configs"
    alone = launch(*common, "--exp-name", "one", "--attention", "fused", before=("--config_file", configs / "cpu.yaml"))
    several = ("--config_file", configs / "multi_gpu.yaml", "--mixed_precision", "no")
    together = launch(*common, "--exp-name", "two", before=several, **ON_CPUS)
    assert alone.returncode == together.returncode == 0, alone.stderr + together.stderr
    assert "world size 2" in together.stdout and together.stdout.count("digits accuracy") == 1
    assert summary(tmp_path / "two")["world_size"] == 2
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 22 and two == pytest.approx(one, abs=1e-5)
    # 359 test images are odd: the ranks' shares are uneven.
    assert summary(tmp_path / "two")["test_accuracy"] == summary(tmp_path / "one")["test_accuracy"]
    assert summary(tmp_path / "two")["evaluated_images"] == 359


@pytest.mark.slow
def test_a_bare_launch_uses_all_the_cores_unless_told_otherwise(tmp_path: Path) -> None:
    small = (
        "--runs-dir",
        tmp_path,
        "--epochs",
        1,
        "--embed-dim",
        8,
        "--depth",
        1,
        "--overwrite",
        "--exp-name",
        "x",
        "--attention",
        "fused",
    )
    assert f"cpu, {CORES} threads" in launch(*small).stdout
    assert "cpu, 1 thread;" in launch(*small, OMP_NUM_THREADS="1").stdout


@pytest.mark.slow
def test_a_mistake_under_the_launcher_is_one_line_of_ours(tmp_path: Path) -> None:
    result = launch("--model", "no_such_model", "--runs-dir", tmp_path / "runs")
    assert result.returncode != 0
    assert "unknown model 'no_such_model'" in one_line_error(result.stderr)
    assert "fastvit_train/" not in result.stderr, "a traceback of ours"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_mistakes_on_two_processes_are_told_once(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes")
    (data / "train" / "circle" / "3.png").write_bytes(b"broken")
    result = launch("--dataset", "folder", "--data-dir", data, "--runs-dir", tmp_path / "runs", processes=2)
    assert result.returncode != 0 and "circle/3.png can't be decoded" in one_line_error(result.stderr)
    assert "fastvit_train/" not in result.stderr, "a traceback of ours"
    streamed = ("--dataset", "folder", "--data-dir", data, "--runs-dir", tmp_path / "streamed", "--stream", "always")
    streamed += ("--attention", "fused")
    result = launch(*streamed, "--batch-size", 8, processes=2)
    assert result.returncode != 0 and "circle/3.png can't be decoded" in one_line_error(result.stderr)
    result = launch("--batch-size", 65, "--runs-dir", tmp_path / "runs", processes=2)
    assert "not a multiple of 2 processes" in one_line_error(result.stderr) and ": 1, 5, 13, 65" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))])
def test_accelerate_reads_every_launch_configuration(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_configs" / name))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16", "fp16")
    assert f"\n| [{name}](../accelerate_configs/{name}) | " in (ROOT / "docs" / "launch.md").read_text()


def test_the_two_launches_of_the_page_on_several_machines_meet_on_machine_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = commands(ROOT / "docs" / "several-machines.md", "sh")
    launches = [command for command in page if command.startswith("accelerate launch ")]
    parsed = [launch_command_parser().parse_args(shlex.split(command)[2:]) for command in launches]
    args = [_validate_launch_command(each)[0] for each in parsed]
    assert [each.machine_rank for each in args] == [0, 1]
    for each in args:
        assert (each.multi_gpu, each.num_machines, each.num_processes, each.training_script) == (True, 2, 16, MODULE)
        assert (each.main_process_ip, each.main_process_port) == ("10.0.0.1", 29500)

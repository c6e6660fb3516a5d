"""The check of a GPU runs on a machine that lacks our dependencies, within its time, and says which goals were met."""

import json
import math
import os
import shutil
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import __main__ as check
from bench.gpu_check import prepare
from bench.gpu_check.__main__ import TIME_RAN_OUT, run_together
from bench.gpu_check.goals import GOALS, Goal
from bench.gpu_check.parts import all_parts
from bench.suites import bench_attention, bench_epoch, bench_step
from tests.support import ROOT, run, wait_until, write_folder, write_program

SCRIPT = str(ROOT / "bench" / "gpu_check.sh")


def write_wheel(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_wheels_are_unpacked_for_this_process_and_its_children_unless_the_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("not_there", "numpy"):
        write_wheel(wheels, name)
    assert prepare.add_wheels(wheels, site) == ["not_there 1.0"]
    assert metadata.version("not-there") == "1.0" and not (site / "numpy.py").exists()
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(site), str(ROOT)]
    assert prepare.add_wheels(wheels, site) == []  # a second time it is there


def test_missing_packages_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.require_packages()
    monkeypatch.setattr(prepare, "is_installed", lambda name: name not in ("tyro", "pytest"))
    with pytest.raises(prepare.NotReady, match="^not installed: tyro pytest; run `pip download -d DIR tyro pytest`.*$"):
        prepare.require_packages()


@pytest.mark.parametrize("format", ["xztar", "tar", "zip"])
@pytest.mark.parametrize("inside", [".", "cifar10"])
def test_images_are_found_in_archives_and_folders(tmp_path: Path, format: str, inside: str) -> None:
    folder = tmp_path / "folder"
    write_folder(folder / inside, per_class=1)
    archive = Path(shutil.make_archive(str(tmp_path / "archive"), format, folder))
    assert prepare.find_images(folder, tmp_path / "unused") == folder / inside
    for _ in range(2):  # the second time it is unpacked already
        found = prepare.find_images(archive, tmp_path / "images")
        assert len(list(found.glob("train/circle/*.png"))) == len(list(found.glob("test/square/*.png"))) == 1


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    for source, message in ("x.tar", "allowed"), ("missing.zip", "allowed"), ("empty", "no folders train/CLASS/"):
        with pytest.raises(prepare.NotReady, match=message):
            prepare.find_images(tmp_path / source, tmp_path / "images")


def test_all_parts_end_in_nine_minutes_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def take_all_the_time(commands: object, log: Path, seconds: float) -> int:
        nonlocal now
        now += seconds
        log.write_text("3 passed")
        return 0

    monkeypatch.setattr(check.time, "monotonic", lambda: now)
    monkeypatch.setattr(check, "run_together", take_all_the_time)
    monkeypatch.setattr(check.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(prepare, "find_environment", lambda: {"device": "made up", "cuda": "13.0"})
    images = write_folder(tmp_path / "folder", per_class=0)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--images", str(images)])
    for name in ("CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "0")
    names = [part.name for part in all_parts(tmp_path, images)]
    stale = tmp_path / names[0] / "bench.json"
    stale.parent.mkdir()
    stale.write_text('{"rows": ["of a run before"]}')
    assert check.main() == 0 and 8 * 60 < now <= 9 * 60 - check.SECONDS_TO_STOP
    done = json.loads((tmp_path / "results.json").read_text())
    assert list(done) == names[: len(done)] and "rows" not in done[names[0]]
    assert f"{names[len(done)]}: no time is left" in capsys.readouterr().out
    assert check.main() == 0
    done_later = json.loads((tmp_path / "results.json").read_text())
    assert list(done_later) == names and done_later["tests"]["summary"] == "3 passed"
    assert capsys.readouterr().out.count("done before") == len(done)


def test_the_parts_time_rows_that_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = (bench_attention, bench_step, bench_epoch)
    for suite in suites:
        monkeypatch.setattr(suite, "device", lambda: torch.device("cuda"))
    ids = [case.id for suite in suites for case in suite.cases()]
    chosen = [row for part in all_parts(Path("out"), None) for command in part.commands for row in only(command)]
    assert len(chosen) >= 15
    assert [row for row in chosen if not any(id.startswith(row) for id in ids)] == []


def only(command: tuple[str, ...]) -> tuple[str, ...]:
    """What a command gives to --only."""
    return command[command.index("--only") + 1 :] if "--only" in command else ()


def test_commands_run_at_the_same_time_and_a_failure_is_kept(tmp_path: Path) -> None:
    meet = "import sys, time, pathlib as p; p.Path(sys.argv[1]).touch()\n"
    meet += "while not p.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert run_together((("-c", meet, a, b), ("-c", meet, b, a)), tmp_path / "log", 60) == 0
    assert run_together((("-c", ""), ("-c", "print('why'); exit(3)")), tmp_path / "log", 60) == 3
    assert (tmp_path / "log").read_text() == "why\n"


def test_commands_are_stopped_together(tmp_path: Path) -> None:
    """Each still runs when the other is interrupted, so that several take no longer to stop than one."""
    program = """
import pathlib, signal, sys, time
me, other = map(pathlib.Path, sys.argv[1:])
def meet(*_):
    me.with_suffix(".stopped").touch()
    while not other.with_suffix(".stopped").exists(): time.sleep(0.01)
    me.with_suffix(".met").touch()
    sys.exit()
signal.signal(signal.SIGINT, meet)
me.touch()
while True: time.sleep(0.01)
"""
    a, b = tmp_path / "a", tmp_path / "b"
    commands = (("-c", program, str(a), str(b)), ("-c", program, str(b), str(a)))
    with (tmp_path / "log").open("w") as output, check.started(commands, output):
        wait_until(lambda: a.exists() and b.exists())
    assert a.with_suffix(".met").exists() and b.with_suffix(".met").exists()


def test_when_the_time_has_run_out_nothing_is_left_running(tmp_path: Path) -> None:
    child = "import pathlib as p, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child += f"while True: p.Path({str(tmp_path / 'alive')!r}).touch(); time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    assert run_together((("-c", parent),), tmp_path / "log", 1.5) == TIME_RAN_OUT
    (tmp_path / "alive").unlink()
    time.sleep(0.2)
    assert not (tmp_path / "alive").exists()


def result(status: int = 0, **values: Any) -> dict[str, Any]:
    return {"exit_status": status, "seconds": 1.0, "environment": {"device": "made up"}, **values}


def row(name: str, images_per_second: float, mib: float = 1.0) -> dict[str, Any]:
    return {"name": name, "images_per_second": images_per_second, "peak_memory_mib": mib, "mfu": 0.4}


def goal(beginning: str) -> Goal:
    return next(goal for goal in GOALS if goal.metric.startswith(beginning))


def test_goals_are_met_missed_or_not_measured() -> None:
    rows = [row("sdpa", 1e7, 90), row("sdpa, CUDA graph", 2e7), row("triton", 3e7, 30), row("triton, CUDA graph", 5e7)]
    results = {"attention-narrow": result(rows=rows)}
    verdicts = {
        "attention forward+backward, B4096 N64 D48, over SDPA": (2.5, "met"),
        "attention forward+backward, B4096 N64 D48, peak": (30 / 90, "met"),
        "attention forward+backward, B1024": (None, "not measured"),
    }
    for metric, (value, verdict) in verdicts.items():
        assert goal(metric).value(results) == pytest.approx(value)
        assert goal(metric).verdict(value) == verdict
    time = next(goal for goal in GOALS if goal.format.endswith("µs") and "backward" in goal.metric)
    assert time.value(results) == pytest.approx(4096 / 5e7 * 1e6) and time.verdict(130.1) == "missed"
    assert all(goal.value({}) is None for goal in GOALS)


def test_the_time_to_an_accuracy_is_the_mean_of_all_runs() -> None:
    reaches = {"name": "a", "epochs": [{"accuracy": 0.5, "seconds": 1.0}, {"accuracy": 0.8, "seconds": 2.0}]}
    later = {"name": "b", "epochs": [{"accuracy": 0.7, "seconds": 1.5}, {"accuracy": 0.7725, "seconds": 3.0}]}
    never = {"name": "c", "epochs": [{"accuracy": 0.7, "seconds": 1.0}]}
    to_target = goal("mc-ViT to 77.25%")
    assert to_target.value({"accuracy": result(runs=[reaches, later])}) == 2.5
    assert to_target.value({"accuracy": result(runs=[reaches, never])}) == math.inf
    assert to_target.value({"accuracy": result(TIME_RAN_OUT, runs=[reaches, never])}) is None


def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has python3, and neither python nor this package on its path."""
    (tmp_path / "bin").mkdir()
    python = write_program(tmp_path / "bin" / "python3", f'exec {sys.executable} "$@"')
    # three runs at once on two cores: with more than a thread each they would wait for one another's threads
    return {"PATH": f"{python.parent}:/usr/bin:/bin", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_check_refuses_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run(["bash", SCRIPT, "out"], tmp_path, **bare(tmp_path))
    assert done.returncode == 2 and "no GPU" in done.stderr and done.stderr.count("\n") == 1
    assert f"torch {torch.__version__}" in done.stdout  # it says what it found


@pytest.mark.slow
def test_a_part_is_done_once_and_the_goals_are_shown(tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "shapes"), "xztar", write_folder(tmp_path / "folder", per_class=80))
    command = ["bash", SCRIPT, "out", "--images", archive, "--any-device", "--parts"]
    env = bare(tmp_path)
    first = run([*command, "accuracy"], tmp_path, **env)
    assert first.returncode == 0, first.stdout + first.stderr
    accuracy = json.loads((tmp_path / "out" / "results.json").read_text())["accuracy"]
    assert accuracy["exit_status"] == 0, (tmp_path / "out" / "accuracy.log").read_text()
    assert [len(each["epochs"]) for each in accuracy["runs"]] == [8, 8, 8]
    lines = {line.split("│")[1].strip(): line for line in first.stdout.splitlines() if "│" in line}
    assert "met" in lines["mc-ViT to 77.25% on CIFAR-10"] or "missed" in lines["mc-ViT to 77.25% on CIFAR-10"]
    assert "not measured" in lines["mc-ViT training step, batch 256"]
    second = run([*command, "accuracy", "step-256"], tmp_path, **env)
    assert "accuracy: done before" in second.stdout and "step-256: done" not in second.stdout
    assert "exit status 2" in second.stdout  # a part that fails, here for want of rows, does not end the check

"""Results do not change with hundreds of evaluations, odd clocks or other locales."""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from fastvit_train.distributed import cpu_threads
from fastvit_train.inference.evaluate import evaluate_run
from tests.reliability.victims import SETTINGS, Victim, differences, outcome, undisturbed
from tests.support import one_line_error, run

Count = Callable[..., None]


@pytest.mark.parametrize("times", [pytest.param(8, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.soak)])
def test_evaluating_leaks_neither_memory_nor_files(
    times: int, tmp_path: Path, count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_threads, "use_all_cores", lambda: torch.set_num_threads(1))
    victim = Victim(tmp_path, "run", "--stop-after", 1)
    assert victim.wait() == [0]
    summary = json.loads((victim.folder / "summary.json").read_text())
    process = psutil.Process()
    taken = []
    for number in range(times):
        assert evaluate_run(victim.folder).evaluation.accuracy == summary["test_accuracy"]
        if number >= times // 4:  # the first evaluations may fill caches
            gc.collect()
            taken.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    memory, files, threads = zip(*taken, strict=True)
    assert max(files) <= files[0] and max(threads) <= threads[0]
    grown = memory[-1] - memory[0]
    assert grown < 8 * 2**20, f"{grown / len(memory) / 1024:.1f} KiB per evaluation"
    count("evaluations without a leak of memory or file handles", times)


def backwards() -> None:
    """Replace the clock by one in another century that runs backwards during training."""
    start = time.perf_counter()
    time.time = lambda: 4e9 - 100 * (time.perf_counter() - start)


@pytest.mark.slow
def test_a_clock_that_runs_backwards(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "run", trick=backwards)
    assert victim.wait() == [0], victim.log.read_text()
    assert differences(outcome(victim.folder), undisturbed(1)) == []
    assert json.loads((victim.folder / "summary.json").read_text())["train_seconds"] > 0


ODD = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "Turkish": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"},
    "no home": {"HOME": "/nonexistent", "XDG_CACHE_HOME": "", "TERM": "dumb", "COLUMNS": "20"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "Turkish" else pytest.mark.soak) for name in ODD]
)
def test_other_locales_and_minimal_environments(name: str, tmp_path: Path) -> None:
    odd = {"OMP_NUM_THREADS": "1", **ODD[name]}
    folder, exp_name = (tmp_path / "runs", "run") if name == "C" else (tmp_path / "läufe", "ığdır")
    command = [sys.executable, "-m", "fastvit_train", "--runs-dir", os.fspath(folder), *SETTINGS, "--stop-after", "1"]
    done = run([*command, "--exp-name", exp_name], **odd)
    assert done.returncode == 0, done.stderr
    assert differences(first_epoch(folder / exp_name), undisturbed_epoch()) == []
    mistaken = run([*command, "--exp-name", "ü/ü"], **odd)
    assert mistaken.returncode == 2 and one_line_error(mistaken.stderr).startswith("--exp-name ")


def first_epoch(folder: Path) -> dict[str, object]:
    return {"losses": (folder / "steps.jsonl").read_text().splitlines()[:11]}


def undisturbed_epoch() -> dict[str, object]:
    return {"losses": undisturbed(1)["steps"].splitlines()[:11]}

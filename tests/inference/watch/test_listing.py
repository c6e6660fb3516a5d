"""What `watch` lists: states, damage, columns, curves, comparisons."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_train.inference.watch import listing
from fastvit_train.inference.watch.curves import MAX_STEPS
from fastvit_train.inference.watch.server import WatchServer
from fastvit_train.runs import comparison
from fastvit_train.runs.lock import HOLDER, RunLock
from fastvit_train.runs.results import read_results, read_runs
from tests.support.watching import SUMMARY, append, ask, dead_process, epoch, listed


def test_the_state_of_a_run_is_told_by_its_folder(make_run: Callable[..., Path], server: WatchServer) -> None:
    folders = {name: make_run(name, finished=name == "finished") for name in ("finished", "stopped", "killed", "afar")}
    (folders["killed"] / HOLDER).write_text(json.dumps(dead_process()))
    (folders["afar"] / HOLDER).write_text(json.dumps({"pid": 1, "host": "another", "started": 1.0}))
    again = RunLock(make_run("again", epochs=3))  # it was finished, and is trained further
    again.acquire()
    runs = listed(server)
    assert {name: run["state"] for name, run in runs.items()} == {
        "again": "training",
        "afar": "training",
        "finished": "finished",
        "stopped": "stopped",
        "killed": "killed",
    }
    assert runs["afar"]["note"] == "in training on another" and runs["again"]["note"] == ""
    again.release()
    assert listed(server)["again"]["state"] == "finished"


def test_runs_in_training_are_first_and_then_the_newest(make_run: Callable[..., Path], server: WatchServer) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        os.utime(make_run(name) / "config.yaml", (1e9 - age, 1e9 - age))
    assert list(listed(server)) == ["new", "older", "oldest"]
    lock = RunLock(server.runs.root / "oldest")
    lock.acquire()
    assert list(listed(server)) == ["oldest", "new", "older"]
    lock.release()


def test_the_columns_are_those_of_compare(make_run: Callable[..., Path], server: WatchServer) -> None:
    make_run("done", epochs=3)
    make_run("stopped", epochs=2, finished=False)
    make_run("new", epochs=0, finished=False)
    runs = listed(server)
    assert runs["done"]["cells"] == ["mc_vit_4_4_32", "digits", "3", "0.6667", "1.5000", "50.00%", "1,000"]
    assert runs["stopped"]["cells"] == ["mc_vit_4_4_32", "digits", "2 of 3", "1.0000", "1.0500", "25.00%", "900"]
    assert runs["new"]["cells"] == ["mc_vit_4_4_32", "digits", "0 of 3", "—", "—", "—", "—"]


def test_the_runs_of_a_sweep_are_listed_and_other_folders_are_not(
    make_run: Callable[..., Path], runs: Path, server: WatchServer
) -> None:
    make_run("sweep/trial-1")
    make_run("a/b/c")
    make_run(".hidden")
    (runs / "notes").mkdir()
    (runs / "file").touch()
    assert list(listed(server)) == ["sweep/trial-1"]


@pytest.mark.skipif(os.name != "posix", reason="makes symbolic links")
def test_a_link_that_leads_to_itself_hides_no_run(
    make_run: Callable[..., Path], runs: Path, server: WatchServer
) -> None:
    make_run("before")
    for name in ("a", "loop", "z"):
        (runs / name).symlink_to(runs / name)
    make_run("zz")
    (make_run("with-a-link") / "report.html").symlink_to("report.html")
    assert set(listed(server)) == {"before", "zz", "with-a-link"}


def damage_settings(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: [")
    (folder / "summary.json").unlink()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "summary is cut short": lambda folder: (folder / "summary.json").write_text('{"model": "a'),
    "summary.json holds a list": lambda folder: (folder / "summary.json").write_text("[]"),
    "a value has a wrong type": lambda folder: (folder / "summary.json").write_text(
        json.dumps({**SUMMARY, "test_loss": "low"})
    ),
    "metrics are missing": lambda folder: (folder / "metrics.jsonl").unlink(),
    "settings can't be read": damage_settings,
    "summary is a folder": lambda folder: ((folder / "summary.json").unlink(), (folder / "summary.json").mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_has_a_note_and_hides_no_other(
    name: str, make_run: Callable[..., Path], server: WatchServer
) -> None:
    make_run("good")
    DAMAGE[name](make_run("bad"))
    runs = listed(server)
    assert runs["good"]["state"] == "finished" and runs["good"]["note"] == ""
    assert runs["bad"]["state"] == "damaged" and runs["bad"]["note"]
    for path in ("/api/curves", "/api/comparison", "/report"):
        answer, text = ask(server, f"{path}?run={runs['bad']['id']}")
        assert answer.status == 422 and runs["bad"]["note"] in text and "\n" not in text[:-1]


def test_a_folder_that_is_gone_leaves_an_empty_list(make_run: Callable[..., Path], server: WatchServer) -> None:
    make_run("a")
    assert list(listed(server)) == ["a"]
    shutil.rmtree(server.runs.root)
    assert listed(server) == {}


def test_of_hundreds_of_runs_only_what_changed_is_read_and_sent(
    make_run: Callable[..., Path], server: WatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("run-0")
    for number in range(1, 300):
        shutil.copytree(folder, folder.with_name(f"run-{number}"))
    read: list[str] = []

    def read_and_note(folder: Path) -> Any:
        read.append(folder.name)
        return read_results(folder)

    monkeypatch.setattr(listing, "read_results", read_and_note)
    first, _ = ask(server, "/api/runs")
    assert len(read) == 300
    read.clear()
    before = listed(server)
    again, text = ask(server, "/api/runs", If_None_Match=str(first.getheader("ETag")))
    assert again.status == 304 and text == "" and read == []
    append(folder, epoch(3))
    after = listed(server)
    assert read == ["run-0"] and after["run-0"]["cells"][3] == "0.6667"
    assert [name for name in after if after[name]["version"] != before[name]["version"]] == ["run-0"]


def test_curves_count_seconds_and_leave_out_what_cannot_be_drawn(
    make_run: Callable[..., Path], server: WatchServer
) -> None:
    folder = make_run("run", finished=False)
    append(folder, epoch(3, test_loss=math.nan, test_accuracy=math.inf, train_loss=1e300), epoch(4) | {"epoch": "4"})
    append(folder, *({"step": step, "loss": 4.0} for step in range(8, 10_000)), name="steps.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tra')  # a line that is being written
    _, text = ask(server, f"/api/curves?run={listed(server)['run']['id']}")
    curves = json.loads(text)
    assert [(row["epoch"], row["seconds"]) for row in curves["epochs"]] == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert curves["epochs"][1] == {
        "epoch": 2,
        "seconds": 3.0,
        "step": 8,
        "train_loss": 1.0,
        "test_loss": 1.05,
        "test_accuracy": 0.25,
    }
    assert [curves["epochs"][2][key] for key in ("train_loss", "test_loss", "test_accuracy")] == [None] * 3
    assert len(curves["steps"]) == MAX_STEPS and curves["steps"][-1] == {"step": 9999, "train_loss": 4.0}
    assert curves["steps"][0] == {"step": 24, "train_loss": (8 * 2.0 + 17 * 4.0) / 25}


def test_the_comparison_is_what_compare_prints(make_run: Callable[..., Path], server: WatchServer) -> None:
    folders = [make_run("a", lr=0.01), make_run("sweep/b", epochs=3, finished=False)]
    runs = listed(server)
    _, text = ask(server, f"/api/comparison?run={runs['a']['id']}&run={runs['sweep/b']['id']}")
    found = json.loads(text)
    _, *rows = comparison.comparison_rows(read_runs(folders))
    assert found["head"] == ["", "a", "sweep/b"] and found["rows"] == rows
    assert rows[found["results"]][0] == "--lr" and rows[found["results"] - 1][0] in comparison.SUMMARY_ROWS


def test_too_many_runs_are_not_compared_and_unknown_ones_are_not_found(
    make_run: Callable[..., Path], server: WatchServer
) -> None:
    make_run("a")
    one = f"run={listed(server)['a']['id']}"
    answer, text = ask(server, "/api/comparison?" + "&".join([one] * 13))
    assert answer.status == 422 and "13 runs" in text and "allowed: 1 to 12" in text
    assert [ask(server, f"/api/{path}")[0].status for path in ("comparison", "curves")] == [422, 422]
    assert ask(server, "/api/comparison?run=a")[0].status == 404


def test_names_that_are_not_text_are_listed(make_run: Callable[..., Path], runs: Path, server: WatchServer) -> None:
    folder = make_run("a")
    try:
        folder.rename(os.fsdecode(os.fsencode(runs) + b"/\xff\x1b[2J"))
    except OSError:
        pytest.skip("this disk only has names that are UTF-8")
    (name,) = listed(server)
    assert name.isprintable() and name.isascii()
    assert ask(server, f"/api/curves?run={listed(server)[name]['id']}")[0].status == 200

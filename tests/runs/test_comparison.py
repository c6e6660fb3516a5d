"""`compare` and `report` on runs that are finished, in training or none, for people and for programs."""

import csv
import io
import json
from pathlib import Path

import pytest

from fastvit_train.cli.main import main
from fastvit_train.runs.results import read_results
from tests.runs.folders import write_config, write_run, write_summary
from tests.support import one_line_error

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `runs` with a finished run, one in training, one before its first epoch, and what is not a run."""
    monkeypatch.chdir(tmp_path)
    write_summary(write_config(write_run(Path("runs/done")), epochs=4, lr=0.5))
    write_config(write_run(Path("runs/training"), epochs=3), model="c_vit_4_4_32")
    write_config(Path("runs/waiting"))
    Path("runs/notes").mkdir()
    Path("runs/x-2seeds.json").write_text("{}")
    return Path("runs")


def compare(capsys: Capture, *args: object) -> tuple[str, str]:
    """Run `compare ARGS`; returns what it prints to stdout and stderr."""
    main(["compare", *map(str, args)])
    said = capsys.readouterr()
    return said.out, said.err


def test_a_run_in_training_is_compared_by_its_results_so_far(runs: Path, capsys: Capture) -> None:
    out, _ = compare(capsys, runs / "done", runs / "training", "--markdown")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    rows = {name: values for name, *values in cells}
    assert rows["model"] == ["mc_vit_4_4_32", "c_vit_4_4_32"]
    assert rows["epochs"] == ["4", "3 of 10"] and rows["accuracy"] == ["75.00%", "70.00%"]
    assert rows["highest accuracy"] == ["80.00%", "70.00%"] and rows["training time"] == ["8 s", "6 s"]
    assert rows["parameters"] == ["1,234", "—"] and rows["images/s"] == ["100", "100"]
    assert rows["--lr"] == ["0.5", "0.006"] and "--weight-decay" not in rows and "--exp-name" not in rows
    assert Path("curves.png").is_file()


@pytest.mark.slow
def test_energy_per_image_has_a_row_if_one_run_has_it(runs: Path, capsys: Capture) -> None:
    assert "energy" not in compare(capsys, runs / "done", runs / "training", "--markdown")[0]
    write_summary(runs / "done", energy_joules_per_image=0.001234)
    assert "| energy per image, mJ | 1.23 | — |" in compare(capsys, runs / "done", runs / "training", "--markdown")[0]


@pytest.mark.slow
def test_a_separate_evaluation_has_a_row_if_one_run_has_it(runs: Path, capsys: Capture) -> None:
    folders = (runs / "done", runs / "training", "--markdown")
    assert "by eval" not in compare(capsys, *folders)[0]
    (runs / "done" / "eval").mkdir()
    file = runs / "done" / "eval" / "evaluation.json"
    evaluation = {"dataset": "other images", "images": 1234, "balanced_accuracy": 0.5, "balanced_accuracy_error": 0.01}
    file.write_text(json.dumps(evaluation))
    lines = compare(capsys, *folders)[0].splitlines()
    assert "| balanced accuracy by eval | 50.00% ± 1.00 | — |" in lines
    assert "| images of eval | 1,234 of other images | — |" in lines
    file.write_text(json.dumps({**evaluation, "tta": "flip"}))
    assert "by eval" not in compare(capsys, *folders)[0]
    file.write_text(json.dumps({**evaluation, "steps": 30}))  # the run was trained further since
    write_summary(runs / "done", steps=40)
    assert "by eval" not in compare(capsys, *folders)[0]
    file.write_text("{")
    with pytest.raises(SystemExit):
        main(["compare", *map(str, folders)])
    assert "evaluation.json cannot be read" in one_line_error(capsys.readouterr().err)


def test_rows_are_selected_in_the_order_given(runs: Path, capsys: Capture) -> None:
    out, _ = compare(capsys, runs / "done", runs / "training", "--markdown", "--rows", "lr", "epochs", "train loss")
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == [
        "--lr", "epochs", "train loss",
    ]  # fmt: skip


def test_what_is_not_a_run_is_passed_over_with_one_line(runs: Path, capsys: Capture) -> None:
    out, err = compare(capsys, *sorted(runs.iterdir()))
    assert err == "passed over, because there is no run in it: runs/notes, runs/x-2seeds.json\n"
    assert "training" in out and "0 of 10" in out
    main(["report", *map(str, sorted(runs.iterdir())), "--output", "page.html"])
    assert capsys.readouterr().err == err and "3 of 10" in Path("page.html").read_text()


def test_a_run_before_its_first_epoch_has_no_curves(runs: Path, capsys: Capture) -> None:
    out, _ = compare(capsys, runs / "waiting")
    assert "no epoch has ended yet, so no curves were drawn" in out and not Path("curves.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runs/notes", "runs/x-2seeds.json"], "runs/notes is not a run: it has no config.yaml"),
        (["runs/typo", "runs/done"], "runs/typo is not a finished run"),
        (
            ["runs/done", "--rows", "epoch"],
            "has no row 'epoch' (did you mean epochs?); --rows allows: model, data, rec",
        ),
        (["runs/done", "--csv", "--rows", "epochs"], "--csv prints the results in full: omit --rows"),
        (["runs/done", "--json", "--csv"], "compare prints one format; give only one of --json, --csv"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, runs: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *args])
    assert stop.value.code == 2 and message in one_line_error(capsys.readouterr().err)
    assert not Path("curves.png").exists()


@pytest.mark.slow
def test_programs_read_json_and_csv(runs: Path, capsys: Capture) -> None:
    write_summary(runs / "done", test_loss=float("nan"))
    out, err = compare(capsys, *sorted(runs.iterdir()), "--json")
    assert "passed over" in err and "written to curves.png" in err
    done, training, waiting = json.loads(out, parse_constant=pytest.fail)
    assert (done["run"], done["folder"], done["finished"]) == ("done", "runs/done", True)
    assert done["results"]["test_accuracy"] == 0.75 and done["results"]["test_loss"] is None
    assert (training["finished"], training["results"]["epochs"], waiting["results"]["epochs"]) == (False, 3, 0)
    assert training["settings"] == {"model": "c_vit_4_4_32", "lr": 0.006, "epochs": 10}
    out, _ = compare(capsys, *sorted(runs.iterdir()), "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["run"] for row in rows] == ["done", "training", "waiting"]
    assert [row["test_accuracy"] for row in rows] == ["0.75", "0.7", ""] and rows[0]["--lr"] == "0.5"
    assert "versions" not in rows[0]


@pytest.mark.parametrize(
    "damage", ['{"epoch": 5}', '{"epoch": "\\u001b[2J", "seconds": 1}', '{"epoch": 5, "seconds": 0}']
)
def test_damaged_metrics_of_a_run_in_training_are_one_line(runs: Path, damage: str, capsys: Capture) -> None:
    with (runs / "training" / "metrics.jsonl").open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(runs / "training")])
    assert stop.value.code == 2 and "runs/training" in one_line_error(capsys.readouterr().err)


def test_a_run_that_trained_on_after_its_end_is_not_finished(tmp_path: Path) -> None:
    run = write_summary(write_config(write_run(tmp_path / "run")))
    assert read_results(run)["test_accuracy"] == 0.75
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").write_bytes((write_run(tmp_path / "longer", epochs=6) / "metrics.jsonl").read_bytes())
    assert read_results(run)["epochs"] == 6 and read_results(run)["planned_epochs"] == 10

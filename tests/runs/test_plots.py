"""The pictures of runs show what they are given: curves, confusion matrices, plans."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.transforms import Bbox

from fastvit_train.runs.plots.curves import plot_curves
from fastvit_train.runs.plots.figures import plot_confusion, plot_images, plot_scaling
from fastvit_train.runs.results import distinct_names
from tests.runs.folders import write_run
from tests.support.pictures import record_pictures


@pytest.mark.slow
def test_losses_share_a_panel_and_the_best_epoch_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    runs = [
        write_run(tmp_path / "_first", epochs=5, test_accuracy=[0.1, 0.5, 0.9, 0.8, 0.7]),
        write_run(tmp_path / "second", epochs=6),
    ]
    plot_curves(runs, tmp_path / "curves.png", "shapes")
    picture = pictures[tmp_path / "curves.png"]
    loss, accuracy = picture.axes
    texts = {"shapes", "loss, nats", "accuracy, %", "train", "test", "most accurate epoch", "epoch", "1", "6"}
    best = {"_first: best 90.00% in epoch 3", "second: best 85.00% in epoch 6"}
    ends = {"0.400", "0.500", "70.0", "0.333", "0.417", "85.0"}
    assert len(picture.panels) == 2 and texts | best | ends <= set(picture.texts)
    assert [len(line.get_xdata()) for line in loss.get_lines()] == [5, 5, 1, 6, 6, 1]
    assert list(accuracy.get_lines()[0].get_ydata()) == pytest.approx([10, 50, 90, 80, 70])
    assert accuracy.get_lines()[1].get_xydata().tolist() == [[3, 90]] and loss.get_lines()[2].get_xdata() == [3]
    assert not _overlap([picture.texts[text] for text in ends])


@pytest.mark.slow
def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for parent in ("old", "new"):
        Path(parent).mkdir()
    runs = [write_run(Path(name), epochs=4).absolute() for name in ("old/run", "new/run", "other")]
    relative = [run.relative_to(tmp_path) for run in runs]
    assert distinct_names(relative) == ["old/run", "new/run", "other"]
    plot_curves(relative, tmp_path / "curves.png", "")
    legend = {text.partition(":")[0] for text in pictures[tmp_path / "curves.png"].texts}
    assert {"old/run", "new/run", "other"} <= legend


def _overlap(boxes: list[Bbox]) -> bool:
    return any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.slow
def test_a_short_run_is_drawn_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    plot_curves([write_run(tmp_path / "run", epochs=2)], tmp_path / "curves.png", "")
    loss, accuracy = pictures[tmp_path / "curves.png"].axes
    assert loss.get_xlabel() == accuracy.get_xlabel() == "step"
    assert list(loss.get_lines()[0].get_xdata()) == list(range(1, 21)), "the train loss of each step"
    assert list(loss.get_lines()[1].get_xdata()) == list(accuracy.get_lines()[0].get_xdata()) == [10, 20]


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "x"), [(2, [2, 4, 6, 8]), (90, [1.5, 3, 4.5, 6])])
def test_curves_over_the_training_time(
    seconds: float, x: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = record_pictures(monkeypatch)
    plot_curves([write_run(tmp_path / "run", seconds=[seconds] * 4)], tmp_path / "curves.png", "", "time")
    loss, _ = pictures[tmp_path / "curves.png"].axes
    unit = {2: "s", 90: "min"}[int(seconds)]
    assert loss.get_xlabel() == f"training time, {unit}" and list(loss.get_lines()[1].get_xdata()) == x


@pytest.mark.slow
def test_losses_that_are_inf_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    run = write_run(tmp_path / "run", test_loss=[1.0, float("inf"), 2.0, float("nan")])
    plot_curves([run], tmp_path / "curves.png", "")
    assert len(pictures[tmp_path / "curves.png"].panels) == 2


def test_a_confusion_matrix_shows_shares_counts_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    confusion = torch.tensor([[30, 10], [0, 1234]])
    plot_confusion(confusion, ["cat", "dog"], "pets: 99%", tmp_path / "confusion.png")
    picture = pictures[tmp_path / "confusion.png"]
    assert len(picture.panels) == 1
    assert {"cat", "dog", "30", "10", "0", "1,234", "predicted", "true", "pets: 99%"} <= set(picture.texts)
    panel = picture.panels[0].astype(int)
    height, width = panel.shape[:2]
    # blue is darkest where the share of the row is largest; the corners of the cells hold no text
    brightness = [
        [panel[row * height // 2 + 20, column * width // 2 + 20].sum() for column in (0, 1)] for row in (0, 1)
    ]
    assert brightness[1][1] < brightness[0][0] < brightness[0][1] < brightness[1][0]


@pytest.mark.slow
def test_long_titles_and_names_stay_inside_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    title = "a data set with a long name, " * 8
    confusion, curves, images = (tmp_path / name for name in ("confusion.png", "curves.png", "images.png"))
    plot_confusion(torch.eye(2, dtype=torch.int64), ["a", "b" * 50], title, confusion)
    plot_curves([write_run(tmp_path / "run")], curves, title)
    assert {title, f"{'b' * 12}…{'b' * 12}"} <= set(pictures[confusion].texts) and title in pictures[curves].texts
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    plot_images(pixels, [f"{'scan-of-page-' * 9}{page}.png\ncat 63.5%" for page in range(6)], images)
    assert list(pictures[images].texts) == [f"scan-of-page…f-page-{page}.png\ncat 63.5%" for page in range(6)]
    first, second, *_ = pictures[images].texts.values()
    assert first.x1 < second.x0, "the names do not overlap"


@pytest.mark.slow
def test_a_plan_shows_memory_and_speed_of_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    points = [(1, 3.5, 800.0), (2, 3.4, 1500.0), (1024, 3.1, 90_000.0)]
    plot_scaling({"small": {"DDP": points}, "large": {"DDP": points, "FSDP2": points}}, tmp_path / "plan.png")
    picture = pictures[tmp_path / "plan.png"]
    assert len(picture.panels) == 2 and all(len(axes.get_lines()) == 3 for axes in picture.axes)
    assert {"small, DDP", "large, DDP", "large, FSDP2", "memory per process, MiB", "processes"} <= set(picture.texts)
    assert {"1", "16", "1,024", "3.2", "1,000", "50,000"} <= set(picture.texts), "the axes are in plain numbers"
    assert not any("\\" in text or "^" in text for text in picture.texts)

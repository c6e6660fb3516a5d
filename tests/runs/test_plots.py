"""The pictures of runs show what they are given: curves, confusion matrices, plans."""

from pathlib import Path

import pytest
import torch

from fastvit_train.runs.plots.curves import plot_curves
from fastvit_train.runs.plots.figures import plot_confusion, plot_images, plot_scaling
from tests.runs.folders import write_run
from tests.support.pictures import record_pictures


def test_curves_have_a_line_per_run_in_each_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "second", epochs=6)]
    plot_curves(runs, tmp_path / "curves.png", "shapes")
    picture = pictures[tmp_path / "curves.png"]
    assert len(picture.panels) == 3 and {"shapes", "first", "second", "epoch", "accuracy, %"} <= set(picture.texts)
    accuracy = picture.axes[-1].get_lines()
    assert [list(line.get_ydata()) for line in accuracy[:2]] == [
        pytest.approx([100 - 90 / (1 + epoch) for epoch in range(epochs)]) for epochs in (4, 6)
    ]


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


def test_long_titles_and_names_stay_inside_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    title = "a data set with a long name, " * 8
    confusion, curves, images = (tmp_path / name for name in ("confusion.png", "curves.png", "images.png"))
    plot_confusion(torch.eye(2, dtype=torch.int64), ["a", "b" * 50], title, confusion)
    plot_curves([write_run(tmp_path / "run")], curves, title)
    assert {title, f"{'b' * 12}…{'b' * 12}"} <= set(pictures[confusion].texts) and title in pictures[curves].texts
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    plot_images(pixels, [f"{'scan-of-page-' * 9}{page}.png" for page in range(2)], images)
    assert list(pictures[images].texts) == [f"scan-of-page…f-page-{page}.png" for page in range(2)]
    first, second = pictures[images].texts.values()
    assert first.x1 < second.x0, "the names do not overlap"


def test_a_plan_shows_memory_and_speed_of_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    points = [(1, 3.5, 800.0), (2, 3.4, 1500.0), (1024, 3.1, 90_000.0)]
    plot_scaling({"small": {"DDP": points}, "large": {"DDP": points, "FSDP2": points}}, tmp_path / "plan.png")
    picture = pictures[tmp_path / "plan.png"]
    assert len(picture.panels) == 2 and all(len(axes.get_lines()) == 3 for axes in picture.axes)
    assert {"small, DDP", "large, DDP", "large, FSDP2", "memory per process, MiB", "processes"} <= set(picture.texts)

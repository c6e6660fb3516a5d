"""Names in scripts that matplotlib's font lacks: drawn with another font of the machine, or as codes and a warning."""

import logging
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import font_manager

from fastvit_train.runs.plots import fonts
from fastvit_train.runs.plots.curves import plot_curves
from fastvit_train.runs.plots.figures import plot_confusion, plot_images
from tests.runs.folders import write_run
from tests.support.pictures import record_pictures

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib's warnings about letters and legends
SCRIPT_G = "\N{SCRIPT SMALL G}"
"""a letter that STIX has, which matplotlib brings along, and DejaVu Sans, its default, has not"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    cached = (fonts._family_with, fonts._system_fonts, fonts._warn_of_missing_letters)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.slow
def test_letters_that_no_font_has_are_drawn_as_codes_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    pictures = record_pictures(monkeypatch)
    confusion, images, curves = (tmp_path / name for name in ("confusion.png", "images.png", "curves.png"))
    plot_confusion(torch.eye(2, dtype=torch.int64), ["猫", "_dog"], "宠物 on 测试", confusion)
    plot_images(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), ["狗.png\n猫 90%"], images)
    plot_curves([write_run(tmp_path / "_运行")], curves, "digits")
    assert {r"\u732b", "_dog", r"\u5ba0\u7269 on \u6d4b\u8bd5"} <= set(pictures[confusion].texts)
    assert set(pictures[images].texts) == {"\\u72d7.png\n\\u732b 90%"}
    assert r"_\u8fd0\u884c: best 77.50% in epoch 4" in pictures[curves].texts
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "install a font that has them, such as Noto Sans CJK" in warnings[0]


def test_a_font_of_the_machine_that_has_the_letters_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(damaged), str(folder / "STIXGeneral.ttf")])
    pictures = record_pictures(monkeypatch)
    plot_confusion(torch.eye(2, dtype=torch.int64), [f"{SCRIPT_G}g", "dog"], "", tmp_path / "confusion.png")
    picture = pictures[tmp_path / "confusion.png"]
    assert f"{SCRIPT_G}g" in picture.texts and not caplog.records
    (axes,) = picture.axes
    assert axes.get_yticklabels()[0].get_fontfamily() == ["sans-serif", "STIXGeneral"]
    assert axes.get_yticklabels()[1].get_fontfamily() == ["sans-serif"]

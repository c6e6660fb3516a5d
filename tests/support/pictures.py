"""What the pictures that matplotlib writes show: the pixels of the file, its panels and its texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

COLOR_BAR = "<colorbar>"
"""matplotlib's name for the panel of a color bar"""

TOLERANCE = 2
"""pixels by which a text may leave the picture: the frame of a letter is larger than its strokes"""


@dataclass(frozen=True)
class Picture:
    """A file that was written, and where matplotlib placed its panels and texts."""

    pixels: np.ndarray
    """uint8 (height, width, 3), as read from the file"""
    panels: tuple[np.ndarray, ...]
    """the pixels of each panel that holds data and shows more than one color"""
    texts: dict[str, Bbox]
    """the texts that are inside the picture and leave more than one color there, and their places"""
    axes: tuple[Axes, ...]
    """the panels as matplotlib knows them, in the order of `panels`"""


def record_pictures(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Picture]:
    """Return a dictionary to which each picture that matplotlib writes during the test is added, by its path."""
    written: dict[Path, Picture] = {}
    save: Callable[..., None] = Figure.savefig
    draw: Callable[[Text, Any], None] = Text.draw
    boxes: dict[Text, Bbox] = {}

    def record_text(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        boxes[text] = text.get_window_extent(renderer)

    def record(figure: Figure, path: Path, **options: Any) -> None:
        boxes.clear()
        save(figure, path, **options)
        figure.set_dpi(options["dpi"])
        written[Path(path)] = _read(figure, boxes, Path(path))

    monkeypatch.setattr(Text, "draw", record_text)
    monkeypatch.setattr(Figure, "savefig", record)
    return written


def _read(figure: Figure, boxes: dict[Text, Bbox], path: Path) -> Picture:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.array(image.convert("RGB"))
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    assert _num_colors(border) == 1, f"something is cut off at the border of {path}"
    panels = [axes for axes in figure.axes if axes.has_data() and axes.get_label() != COLOR_BAR]
    drawn = [axes for axes in panels if _num_colors(_cut(pixels, axes.get_window_extent())) > 1]
    return Picture(
        pixels,
        tuple(_cut(pixels, axes.get_window_extent()) for axes in drawn),
        {text.get_text(): box for text, box in boxes.items() if _num_colors(_cut(pixels, box)) > 1},
        tuple(drawn),
    )


def _cut(pixels: np.ndarray, box: Bbox) -> np.ndarray:
    """The pixels inside a box of matplotlib, whose y axis points up; empty unless the box is inside the picture."""
    height, width = pixels.shape[:2]
    left, right, top, bottom = (round(edge) for edge in (box.x0, box.x1, height - box.y1, height - box.y0))
    is_inside = min(left, top, width - right, height - bottom) >= -TOLERANCE
    return pixels[max(top, 0) : bottom, max(left, 0) : right] if is_inside else pixels[:0]


def _num_colors(pixels: np.ndarray) -> int:
    return len(np.unique(pixels.reshape(-1, 3), axis=0))

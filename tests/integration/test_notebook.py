"""The notebook runs as it is: curves that grow while it trains, an accuracy, an attention map. No outputs are kept."""

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT, environment
from tests.support.pages import relative_links

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
MIN_ACCURACY = 0.8
"""its eight epochs reach 88%, and guessing 10%"""


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def pixels(png: str) -> np.ndarray:
    """uint8 (height, width, 3)"""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        return np.asarray(image.convert("RGB"))


def test_it_is_valid_and_no_outputs_are_kept(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id


def test_its_links_lead_to_files() -> None:
    links = relative_links(NOTEBOOK)
    assert "own-images.md" in links and all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_it_trains_shows_the_curves_after_each_epoch_and_draws_where_the_model_looks(
    notebook: Any, tmp_path: Path
) -> None:
    client = pytest.importorskip("nbclient").NotebookClient
    curves: list[str] = []
    """the pictures that took the place of the one before"""

    class Client(client):  # type: ignore[misc, valid-type]
        def process_message(self, message: dict[str, Any], cell: Any, cell_index: int) -> Any:
            if message["msg_type"] == "update_display_data" and cell.id == "train":
                curves.append(message["content"]["data"]["image/png"])
            return super().process_message(message, cell, cell_index)

    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    Client(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute(
        env={**environment(PYTHONPATH=python_path), "OMP_NUM_THREADS": "1"}
    )
    cells = {cell.id: cell for cell in notebook.cells}

    assert len(set(curves)) == len(curves) == 8 and all(len(np.unique(pixels(png))) > 1 for png in curves)

    (said,) = (output.text for output in cells["evaluate"].outputs if output.output_type == "stream")
    accuracy = float(re.search(r"accuracy ([\d.]+)%", said)[1]) / 100  # type: ignore[index]
    assert accuracy > MIN_ACCURACY

    predictions = "".join(output.text for output in cells["predict"].outputs if output.output_type == "stream")
    assert re.fullmatch(r"(\d with \d+%\n){6}", predictions)

    (figure,) = (output.data["image/png"] for output in cells["attention"].outputs if "data" in output)
    colors = pixels(figure).astype(int)
    is_colored = np.ptp(colors, axis=2) > 60  # the digits alone are gray
    assert is_colored.mean() > 0.01 and len(np.unique(colors[is_colored], axis=0)) > 100

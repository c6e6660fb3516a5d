"""The one private name of timm that the package needs does what timm's public function does."""

import json
import re
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from fastvit_train.config.timm_config import TAG, write_timm_config
from tests.support import ROOT


@pytest.mark.parametrize(("name", "tag"), [("mc_vit_4_4_32", f".{TAG}"), ("vit_tiny_patch16_224", "")])
def test_the_config_is_the_one_that_timm_writes_but_for_the_tag_of_ours(tmp_path: Path, name: str, tag: str) -> None:
    model = timm.create_model(name, img_size=32, embed_dim=12, num_heads=2, depth=1, num_classes=2)
    labels, preprocessing = {"label_names": ["cat", "dog"]}, {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3)}
    write_timm_config(model, tmp_path / "config.json", labels, preprocessing)
    save_for_hf(model, tmp_path / "timm", labels, safe_serialization=True, data_config=preprocessing)
    expected = json.loads((tmp_path / "timm" / "config.json").read_text())
    expected["architecture"] += tag
    assert json.loads((tmp_path / "config.json").read_text()) == expected


def test_only_one_module_imports_private_names_of_timm() -> None:
    files = [path for folder in ("fastvit_train", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    private = re.compile(r"(?:from|import) timm(?:\.\w+)*\._|from timm\S* import (?:.*, )?_", re.MULTILINE)
    importing = [path.relative_to(ROOT).as_posix() for path in files if private.search(path.read_text())]
    assert importing == ["fastvit_train/config/timm_config.py"]

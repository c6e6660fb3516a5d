"""What timm opens without `import fastvit_train`, and what it says where it can't."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from fastvit_train.config.schema import TrainConfig
from fastvit_train.inference.export import export_run
from fastvit_train.inference.trained_model import load_run
from fastvit_train.training.loop import fit
from tests.support import environment

OPEN = """
import sys, timm, torch
for folder in sys.argv[2:]:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.save(model(torch.load(sys.argv[1])), f"{folder}/logits.pt")
    except RuntimeError as error:
        print(error)
assert "fastvit_train" not in sys.modules
"""


@pytest.fixture
def theirs(small_config: Callable[..., TrainConfig], tmp_path: Path) -> Path:
    """The folder of a run of one of timm's own models."""
    settings = {"model": "vit_tiny_patch16_224", "image_size": 16, "attention": "fused", "epochs": 1}
    fit(small_config(**settings, exp_name="theirs"))
    return tmp_path / "runs" / "theirs"


@pytest.mark.slow
def test_timm_opens_its_own_models_and_names_the_import_for_ours(
    theirs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = [export_run(str(run), "timm", tmp_path / run.name) for run in (theirs, trained)]
    printed = capsys.readouterr().out
    assert f"to open it: import timm; timm.create_model('local-dir:{exports[0]}', pretrained=True)" in printed
    assert f"to open it: import timm, fastvit_train; timm.create_model('local-dir:{exports[1]}'" in printed
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    folders = [theirs, exports[0], trained, exports[1]]
    command = [sys.executable, "-c", OPEN, str(tmp_path / "images.pt"), *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Unknown model (mc_vit_4_4_32.import_fastvit_train_first)"] * 2
    with torch.no_grad():
        expected = load_run(theirs, device="cpu").model(images)
    for folder in folders[:2]:
        assert torch.allclose(torch.load(folder / "logits.pt"), expected, atol=1e-5)


def test_with_the_import_timm_opens_ours(trained: Path) -> None:
    model = timm.create_model(f"local-dir:{trained}", pretrained=True)
    assert model.pretrained_cfg["architecture"] == "mc_vit_4_4_32"
    assert torch.equal(model.pos_embed, load_run(trained, device="cpu").model.pos_embed)

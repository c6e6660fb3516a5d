"""`export --to onnx --quantize int8`: 8-bit weights, and the accuracy that they cost."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
import onnxruntime
import torch

from fastvit_train.cli.main import main
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.inference.trained_model import load_run
from tests.inference.test_export import refused
from tests.support import rgb, write_folder

PRINTED = r"written to (.*): test accuracy on digits (\S+)%, before (\S+)% \(359 images\); (\S+) MB, before (\S+) MB\n"


@pytest.mark.slow
def test_both_accuracies_are_measured_printed_and_recorded(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    main(["export", str(run), "--to", "onnx", "--quantize", "int8"])
    printed = re.fullmatch(PRINTED, capsys.readouterr().out)
    assert printed is not None
    path = run / "export" / "model-int8.onnx"
    assert printed[1] == str(path) and [other.name for other in path.parent.iterdir()] == [path.name]

    program = onnx.load(path)
    int8 = [weight.name for weight in program.graph.initializer if weight.data_type == onnx.TensorProto.INT8]
    quantized = [name for name in int8 if name.endswith("_quantized")]
    assert len(quantized) >= 4 * 2 + 1, "qkv, projection and both layers of the MLP of each block, and the classifier"
    session = onnxruntime.InferenceSession(path)
    test = load_run(run).dataset().test
    batches = [test.resized_pixels(samples, rgb(32)).numpy() for samples in torch.arange(359).split(256)]
    logits = torch.cat([torch.from_numpy(session.run(None, {"images": images})[0]) for images in batches])
    after = (logits.argmax(1) == test.labels).double().mean().item()
    assert float(printed[2]) == pytest.approx(100 * after, abs=0.006)
    assert float(printed[3]) == pytest.approx(100 * evaluate(run).accuracy, abs=0.006) and after > 0.5
    assert float(printed[4]) == pytest.approx(path.stat().st_size / 1e6, abs=0.006)
    assert float(printed[4]) < float(printed[5])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["architecture"] == "mc_vit_4_4_32"
    measured = json.loads(metadata["measured"])
    assert measured["accuracy"] == pytest.approx(after) and measured["images"] == 359
    assert measured["dataset"] == "digits" and measured["evaluated_on"] == "test"


def test_what_cannot_be_quantized_or_measured_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, trained, "--to", "timm", "--quantize", "int8")
    assert message == "--quantize int8 is not available for --to timm; give --to onnx"
    output = ("--to", "onnx", "--quantize", "int8", "--output", tmp_path / "x.onnx")
    (tmp_path / "weights").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, tmp_path / "weights")
    assert "does not record a data set" in refused(capsys, f"local-dir:{tmp_path / 'weights'}", *output)
    photos, runs = write_folder(tmp_path / "photos"), ("--runs-dir", str(tmp_path / "runs"), "--exp-name", "run")
    small = ("--depth", "1", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "fused")
    main(["--dataset", "folder", "--data-dir", str(photos), "--epochs", "1", *runs, *small])
    shutil.rmtree(photos)
    assert str(photos) in refused(capsys, tmp_path / "runs" / "run", *output)
    assert not (tmp_path / "x.onnx").exists() and not list(tmp_path.glob(".*"))

"""Exported models give the same logits without this package, describe their input, and are never half-written."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
import onnxruntime
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from fastvit_train.cli.main import main
from fastvit_train.config.resolved import InputSize
from fastvit_train.data.sources import download
from fastvit_train.inference.export import FORMATS, _write_safetensors
from fastvit_train.inference.trained_model import load_run
from tests.support import one_line_error, write_folder
from tests.support.cifar import write_cifar10

pytestmark = pytest.mark.slow
SMALL = (
    *("--depth", "2", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "sdpa"),
    *("--epochs", "2", "--no-telemetry"),
)
SHAPES = ("circle", "square")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of trained models: runs of mc-ViT and c-ViT, and models that timm saved."""
    root = tmp_path_factory.mktemp("models")
    main(["--runs-dir", str(root), "--exp-name", "mc-vit", *SMALL])
    photos = ("--dataset", "folder", "--data-dir", str(write_folder(root / "photos", classes=SHAPES, size=40)))
    main(["--runs-dir", str(root), "--exp-name", "c-vit", "--model", "c_vit_4_4_32", *photos, *SMALL])
    wide = ("--in-chans", "1", "--image-size", "16x40", "--dataset", "folder", "--data-dir", str(root / "photos"))
    main(["--runs-dir", str(root), "--exp-name", "wide-gray", *wide, *SMALL])
    torch.manual_seed(0)
    ours = timm.create_model("mc_vit_4_4_32", num_classes=7, img_size=24, depth=1, qkv_bias=False)
    save_for_hf(ours, str(root / "by-timm"), safe_serialization=True)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, depth=1, embed_dim=24)
    afresh = ("--model", "test_vit", "--image-size", "32", "--epochs", "1", "--no-telemetry")
    main(["--runs-dir", str(root), "--exp-name", "timms-afresh", "--attention", "timm", *afresh])
    for name in ("cct_2_3x2_32", "cvt_7_4_32"):
        compact = timm.create_model(name, depth=1, embed_dim=32)
        save_for_hf(compact, str(root / name), safe_serialization=True)
    save_for_hf(vit, str(root / "timms-own"), {"label_names": ["a", "b", "c"]}, safe_serialization=True)
    return root


def exported(run: Path, to: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """The path that `export` wrote; it must write and print nothing else."""
    capsys.readouterr()
    main(["export", str(run), "--to", to])
    printed = capsys.readouterr()
    opening = r"to open it: import timm(, fastvit_train)?; timm.create_model\(.*\)\n" if to == "timm" else ""
    line = rf"written to (.*): the logits differ by at most (\S+) on \d+ images of \w+\n{opening}"
    match = re.fullmatch(line, printed.out)
    assert match and float(match[2]) <= 1e-4 and not printed.err, printed
    path = Path(match[1])
    assert path == run / "export" / FORMATS[to].name
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    assert not list(run.glob(".unfinished*"))
    return path


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return (images.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def logits_of(path: Path, to: str, images: Tensor) -> tuple[Tensor, dict[str, str]]:
    """The logits and metadata, computed only with the library that the format is for."""
    if to == "onnx":
        session = onnxruntime.InferenceSession(path)
        (feed,), (answer,) = session.get_inputs(), session.get_outputs()
        assert (feed.name, feed.type, answer.name) == ("images", "tensor(uint8)", "logits")
        assert {opset.domain for opset in onnx.load(path).opset_import} == {""}
        return torch.tensor(
            session.run(None, {"images": images.numpy()})[0]
        ), session.get_modelmeta().custom_metadata_map
    if to == "torch-export":
        files = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=files)
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not [name for name in names if not name.startswith("aten.") and "getitem" not in name]
        return program.module()(images), json.loads(files["metadata.json"])
    if to == "safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        model = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"]))
        model.load_state_dict(load_file(path))
        return model.eval()(normalised(images, json.loads(metadata["mean"]), json.loads(metadata["std"]))), metadata
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    metadata = {
        "class_names": json.dumps(cfg.get("label_names") or [str(number) for number in range(model.num_classes)]),
        "image_size": str(InputSize(*cfg["input_size"]).image_size),
        "architecture": cfg["architecture"],
        "mean": json.dumps(cfg["mean"]),
        "std": json.dumps(cfg["std"]),
    }
    assert {path.name for path in path.iterdir()} == {"model.safetensors", "config.json"}
    return model(normalised(images, cfg["mean"], cfg["std"])), metadata


TRACED = ("onnx", "torch-export")  # tracing takes seconds
CASES = [
    pytest.param(name, to, marks=[pytest.mark.slow] if to in TRACED and name != "mc-vit" else [])
    for name in ("mc-vit", "c-vit", "wide-gray", "by-timm", "timms-own", "timms-afresh", "cct_2_3x2_32", "cvt_7_4_32")
    for to in FORMATS
]


@pytest.mark.parametrize(("name", "to"), CASES)
@torch.no_grad()
def test_an_exported_model_gives_the_same_logits(
    models: Path, name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    run = shutil.copytree(models / name, tmp_path / name, symlinks=True)
    loaded = load_run(run, device="cpu")
    size = loaded.input_size
    path = exported(run, to, capsys)
    for count in (1, 5, 65):
        images = torch.randint(0, 256, (count, *size), dtype=torch.uint8)
        logits, metadata = logits_of(path, to, images)
        torch.testing.assert_close(logits, loaded.model(loaded.preprocess(images)), rtol=0, atol=1e-4)
    assert metadata["architecture"] == loaded.architecture
    assert tuple(json.loads(metadata["class_names"])) == loaded.classes
    assert metadata["image_size"] == str(size.image_size) == {"by-timm": "24", "wide-gray": "16x40"}.get(name, "32")
    assert tuple(map(tuple, (json.loads(metadata["mean"]), json.loads(metadata["std"])))) == loaded.normalisation
    if to != "timm":
        assert "center" in metadata["resize"]
    elif name == "timms-afresh":
        described = json.loads((path / "config.json").read_text())["pretrained_cfg"]
        assert (described["license"], described["crop_pct"], described["interpolation"]) == (None, 1.0, "bilinear")


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, args)])
    assert stop.value.code == 2
    return one_line_error(capsys.readouterr().err)


def test_logits_are_compared_on_the_test_images_or_on_digits(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    main(["export", str(models / "c-vit"), "--to", "safetensors", "--output", str(tmp_path / "x.safetensors")])
    assert "on 24 images of photos" in capsys.readouterr().out
    monkeypatch.setattr(download, "download_url", lambda *_: pytest.fail("something was downloaded"))
    cifar = write_cifar10(tmp_path / "cifar", monkeypatch, per_batch=4)
    main(["--runs-dir", str(tmp_path), "--exp-name", "run", "--dataset", "cifar10", "--data-dir", str(cifar), *SMALL])
    shutil.rmtree(cifar)
    assert (tmp_path / "run" / "summary.json").is_file() and not cifar.exists()
    capsys.readouterr()
    main(["export", str(tmp_path / "run"), "--to", "safetensors"])
    assert "on 256 images of digits" in capsys.readouterr().out
    assert not cifar.exists()


def test_an_export_with_other_logits_is_removed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(models / "mc-vit", tmp_path / "run", symlinks=True)
    before = sorted(run.rglob("*"))

    def slightly_off(loaded: object, path: Path) -> None:
        _write_safetensors(loaded, path)  # type: ignore[arg-type]
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights = load_file(path)
        weights["head.bias"][0] += 1e-3
        save_file(weights, path, metadata)

    monkeypatch.setitem(FORMATS, "safetensors", replace(FORMATS["safetensors"], write=slightly_off))
    assert "differ by up to 1.0e-03; allowed: 1e-04" in refused(capsys, run, "--to", "safetensors")
    assert sorted(run.rglob("*")) == before
    weights = load_file(run / "model.safetensors")
    save_file(
        {**weights, "head.bias": weights["head.bias"] * float("nan")}, run / "model.safetensors", {"format": "pt"}
    )
    assert "are NaN or inf" in refused(capsys, run, "--to", "timm")
    assert sorted(run.rglob("*")) == before


def test_a_model_that_the_exporter_does_not_support_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_value(model: torch.nn.Module, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :7] if x.sum() > 1e9 else x.flatten(1)[:, 1:8]

    monkeypatch.setattr("fastvit_train.models.vit.ViT.forward", by_value)
    message = refused(capsys, models / "by-timm", "--to", "torch-export", "--output", tmp_path / "x.pt2")
    assert re.search("by-timm cannot be exported to torch-export: .*; try another --to", message)
    assert not list(tmp_path.iterdir())


def test_the_output_can_be_named_and_nothing_else_is_overwritten(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = models / "mc-vit"
    assert "allowed: a name that ends in .onnx" in refused(capsys, run, "--to", "onnx", "--output", tmp_path / "x.pt2")
    new = tmp_path / "some" / "where" / "model.safetensors"
    for _ in range(2):
        main(["export", str(run), "--to", "safetensors", "--output", str(new)])
        main(["export", str(run), "--to", "timm", "--output", str(new.parent / "timm")])
    assert sorted(path.name for path in new.parent.iterdir()) == ["model.safetensors", "timm"]
    (new.parent / "timm" / "thesis.txt").write_text("years of work")
    assert "timm holds something else, such as thesis.txt" in refused(
        capsys, run, "--to", "timm", "--output", new.parent / "timm"
    )
    assert (new.parent / "timm" / "thesis.txt").is_file()
    for to, bad in (("safetensors", "/dev/null/x.safetensors"), ("timm", "/dev/null/x")):
        assert f"{bad} cannot be written" in refused(capsys, run, "--to", to, "--output", bad)


def test_missing_packages_and_several_processes_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    output = ("--output", tmp_path / "x.onnx")
    assert "--to onnx needs onnxruntime; pip install onnxruntime" in refused(
        capsys, models / "mc-vit", "--to", "onnx", *output
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "export runs in one process, and the launch started 2" in refused(capsys, models / "mc-vit", *output)
    assert not list(tmp_path.iterdir())

"""Gray images and images that are not square: trained, resumed, evaluated and shown as all others."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from fastvit_train.cli.main import main
from fastvit_train.cli.parser import parse
from fastvit_train.cli.training_verbs import Train
from fastvit_train.config.overrides import override
from fastvit_train.config.resolved import InputSize
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.datasets import load_dataset
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.inference.trained_model import load_run
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.loop import train
from fastvit_train.utils.errors import UserError
from tests.support import launch, write_folder
from tests.support.cifar import write_cifar10

AUGMENTED = {
    "crop": "resized", "flip": "random", "auto_augment": "trivial", "color_jitter": 0.2, "random_erasing": 0.3,
    "mixup": 0.2, "cutmix": 1.0,
}  # fmt: skip
SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 2, "attention": "fused", "batch_size": 8, "telemetry": False}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run with gray images of 16 x 40 pixels, of classes with another brightness each."""
    photos = write_folder(tmp_path_factory.mktemp("wide") / "photos", classes=("red", "green"), size=40)
    return {"dataset": "folder", "data_dir": str(photos), "in_chans": 1, "image_size": "16x40", **SMALL}


@pytest.fixture(scope="module")
def runs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(runs_dir=str(runs), exp_name="whole", epochs=8, lr=3e-3, **AUGMENTED, **settings)
    return runs


@pytest.mark.slow
def test_it_learns_from_gray_levels_and_the_evaluation_is_the_same(runs: Path) -> None:
    run = load_run(runs / "whole")
    assert run.input_size == (1, 16, 40) and run.model.patch_embed.grid_size == (4, 10)
    assert "in_chans: 1\nmean" in (text := (runs / "whole" / "config.yaml").read_text()) and "image_size: 16x40" in text
    assert evaluate(runs / "whole").accuracy == 1.0


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, settings: dict[str, Any]) -> None:
    halves = {"runs_dir": str(runs), "exp_name": "halves", "epochs": 8, "lr": 3e-3, **AUGMENTED, **settings}
    train(stop_after=3, **halves)
    train(resume="must", **halves)
    whole, resumed = (load_file(runs / name / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_agree_with_one(settings: dict[str, Any], tmp_path: Path) -> None:
    flags = [
        word for key, value in {**settings, **AUGMENTED, "epochs": 2}.items() if key != "telemetry"
        for word in (f"--{key.replace('_', '-')}", value)
    ]  # fmt: skip
    for processes in (1, 2):
        done = launch(*flags, "--runs-dir", tmp_path, "--exp-name", processes, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in "12")
    for key in ("train_loss", "test_loss"):
        assert [epoch[key] for epoch in one] == pytest.approx([epoch[key] for epoch in two], abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["inspect", "predict", "report"])
def test_pictures_show_wide_gray_images(
    verb: str, runs: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(Path(settings["data_dir"], "test", "green").iterdir())
    output = tmp_path / "output"
    words = {
        "inspect": [str(image), "--output", str(output)],
        "predict": [str(image), "--show", "--output", str(output)],
        "report": ["--output", str(output / "report.html")],
    }[verb]
    output.mkdir()
    main([verb, str(runs / "whole"), *words])
    assert [path.name for path in output.iterdir()]
    if verb == "predict":
        assert "resized to cover 16 x 40 pixels" in " ".join(capsys.readouterr().out.split())
        assert Image.open(output / "1.png").convert("RGB").getcolors(10**6)


def test_the_example_of_a_pushed_model_reads_gray_images(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "whole", tmp_path / "run", symlinks=True)
    main(["push", str(run), "me/wide", "--dry-run"])
    readme = (run / "hub" / "README.md").read_text()
    assert "- input: gray images, resized to cover 16 x 40 pixels (height x width)" in readme
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    Image.new("RGB", (100, 40)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(example.replace("hf-hub:me/wide", f"local-dir:{run / 'hub'}"), "README.md", "exec"), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("in_chans", "mean"), [(1, (0.5 * 0.299 + 0.6 * 0.587 + 0.7 * 0.114,)), (3, (0.5, 0.6, 0.7))])
def test_a_run_with_its_own_mean_is_a_start_for_other_channels(
    in_chans: int, mean: tuple[float, ...], tmp_path: Path
) -> None:
    settings = {"runs_dir": str(tmp_path), "epochs": 1, **SMALL, "batch_size": 240}
    train(exp_name="first", mean=(0.5, 0.6, 0.7), std=(0.2, 0.2, 0.2), **settings)
    words = ["--init-from", str(tmp_path / "first"), "--in-chans", str(in_chans)]
    parsed = parse("train", Train, words).training.model
    assert (parsed.mean, parsed.in_chans) == (pytest.approx(mean), in_chans)
    train(exp_name="second", init_from=str(tmp_path / "first"), in_chans=in_chans, **settings)
    first, second = (load_run(tmp_path / name) for name in ("first", "second"))
    assert second.normalisation == (pytest.approx(mean), (0.2,) * in_chans)
    back = {"exp_name": "back", "init_from": str(tmp_path / "second"), "in_chans": 3}
    train(**back, **settings)
    assert len(load_run(tmp_path / "back").normalisation[0]) == 3 and first.input_size.channels == 3


def test_models_of_other_channels_are_refused(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_vit", in_chans=4, img_size=32), tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match="takes images of 4 channels; allowed: models for 1 or 3 channels"):
        load_run(f"local-dir:{tmp_path}")


def test_data_sets_of_tensors_become_gray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    config = override(TrainConfig(), {"dataset": "cifar10", "data_dir": str(tmp_path)}, "the test").data
    color, gray = (load_dataset(config, InputSize(channels, 32, 32)).train.images for channels in (3, 1))
    assert gray.shape == (100, 1, 32, 32)  # type: ignore[union-attr]
    image = Image.fromarray(color[7].permute(1, 2, 0).numpy()).convert("L")  # type: ignore[index]
    assert gray[7].flatten().tolist() == np.array(image).flatten().tolist()  # type: ignore[index]


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_every_data_set_has_one_channel(name: str) -> None:
    config = override(TrainConfig(), {"dataset": name, "holdout": 0.1}, "the test").data
    dataset = load_dataset(config, InputSize(1, 16, 24))
    assert dataset.train.images.shape[1] == dataset.test.images.shape[1] == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": "32x"}, "--image-size '32x' is not allowed; allowed: a side in pixels, or HEIGHTxWIDTH such"),
        ({"image_size": [0, 32]}, r"--image-size \[0, 32\] is not allowed"),
        ({"image_size": 4097}, "--image-size 4097 is not allowed"),
        ({"image_size": "30x32"}, "image size 30x32 is not a multiple of patch size 4"),
        ({"in_chans": "gray"}, r"in_chans: 'gray' in train\(\) is not allowed; allowed: 1, 3"),
        ({"in_chans": True}, "allowed: 1, 3"),
        ({"mean": 0.5}, r"mean: 0.5 in train\(\) is not of type list"),
        ({"in_chans": 2}, r"in_chans: '2' in train\(\) is not allowed; allowed: 1, 3"),
    ],
)
def test_sizes_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(runs_dir=str(tmp_path / "runs"), **settings)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", [32, "32", 32.0, "32x32", [32, 32], (32, 32)])
def test_a_square_is_one_number(value: object) -> None:
    assert override(TrainConfig(), {"image_size": value}, "the test").model.image_size == 32

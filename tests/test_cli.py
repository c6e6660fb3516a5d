"""The command line: what is asked for happens, mistakes are one line and status 2, nothing is written."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_line_error, run, write_cifar10, write_folder

from fastvit_train.cli import main


def mistake(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The line that the command is answered with; it must exit with status 2 and print nothing else."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in captured.err
    return one_line_error(captured.err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--recipe fast", "unknown recipe 'fast'.*allowed: quickstart, seed-cifar10"),
        ("--recipe", "expected one argument|Missing value"),
        ("--model vit_mini", "unknown model 'vit_mini'"),
        ("--attention flash", "unknown attention implementation 'flash'; allowed: naive, fused, sdpa"),
        ("--dataset mnist", "invalid choice 'mnist' for argument '--dataset'. Expected one of .*digits"),
        ("--epoch 3", "unknown flag --epoch; did you mean --epochs"),
        ("--xyzzy", "unknown flag --xyzzy; see --help"),
        ("--epochs three", "--epochs 'three' is not allowed; allowed: INT"),
        ("--epochs", "--epochs"),
        ("--epochs 0", "--epochs 0 is out of range; allowed: 1 or more"),
        ("--lr -1", "--lr -1.0 is out of range"),
        ("--optimizer adamx", "unknown optimizer 'adamx'; allowed: "),
        ("--patch-size 5", "image size 32x32 is not a multiple of patch size 5"),
        ("--num-heads 5", "num_heads 5 does not divide embed_dim 48"),
        ("--model resnet18 --embed-dim 8", "resnet18 can't be built with .*embed_dim"),
        ("--num-classes 4", "labels from 0 to 9, outside the 4 classes"),
        ("--grad-accum 3", "--batch-size 64 can't be cut evenly into 1 processes x 3 micro-batches"),
        ("--weights missing.pth", "no weights at missing.pth"),
        ("--config missing.yaml", "--config missing.yaml can't be read"),
        ("--resume must", "has no checkpoint to resume from"),
        ("--resume sometimes", "invalid choice 'sometimes'"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere is no folder"),
        ("--dataset cifar10 --data-url http://127.0.0.1:9/x", "can't download .* put cifar-10-python.tar.gz"),
        ("--dataset cifar10 --data-url ftp://x", "can't download ftp://x .no URL; allowed are http"),
        ("--seed 4294967296", "--seed 4294967296 is out of range"),
        ("--mlp-ratio 0", "--mlp-ratio 0.0 is out of range"),
        (f"--exp-name {'x' * 300}", "must be a plain folder name of up to 200 letters"),
        ("--optimizer adahessian", "optimizer 'adahessian' can't be used: it needs second derivatives"),
        ("--exp-name a/b", "--exp-name 'a/b' must be a plain folder name"),
        ("frobnicate", "unknown verb 'frobnicate'; allowed: train, profile, plan, eval"),
        ("profile --steps 0", "--steps 0 is out of range; allowed: 1 or more"),
        ("profile --output /dev/null/profile", "can't write /dev/null/profile"),
        ("eval nowhere", "nowhere is no run"),
        ("export nowhere", "nowhere is no run"),
        ("export nowhere --to tflite", "invalid choice 'tflite' for argument '--to'"),
        ("push nowhere", "the following arguments are required|[Mm]issing"),
        ("compare nowhere", "nowhere is no finished run"),
        ("compare --out x.png", "unknown flag --out; did you mean --output"),
        ("train foo", "unknown argument foo; see --help"),
        ("compare", "compare takes the folders of one or more runs"),
        ("--runs-dir /dev/null/runs", "can't write /dev/null/runs/digits"),
    ],
)
def test_mistakes(
    args: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, mistake(capsys, *args.split()))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown key 'epochz' in .*my.yaml; did you mean epochs"),
        ("epochs: many", "epochs: 'many' in .*my.yaml is not of type int"),
        ("- a list", "must hold `name: value` lines"),
        ("a: [", "can't be read"),
        ("recipe: nope", "unknown recipe 'nope'"),
        ("epochs: 2020-99-99", "can't be read"),
    ],
)
def test_mistakes_in_a_config_file(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert re.search(message, mistake(capsys, "--config", file, "--runs-dir", tmp_path / "runs"))


def test_a_run_can_be_run_again_from_its_saved_configuration(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    small = ["--epochs", "2", "--embed-dim", "16", "--depth", "1", "--seed", "3", "--track", "tensorboard"]
    small += ["--attention", "fused"]  # auto measures for seconds
    main(["--runs-dir", str(runs), "--exp-name", "a", *small])
    main(["train", "--config", str(runs / "a" / "config.yaml"), "--exp-name", "b"])
    first, second = (torch.load(runs / n / "checkpoints/last/optimizer.bin", weights_only=True) for n in "ab")
    assert str(first["state"]) == str(second["state"])
    main(["--config", str(runs / "a" / "config.yaml"), "--resume", "must"])


def test_eval_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    main(["--runs-dir", str(runs), "--exp-name", "a", "--epochs", "1", "--depth", "1", "--attention", "sdpa"])
    main(["eval", str(runs / "a"), "--attention", "naive"])
    assert "digits (test, 359 images) accuracy" in capsys.readouterr().out
    main(["compare", str(runs / "a"), str(runs / "a"), "--output", str(tmp_path / "x.png"), "--markdown"])
    assert "| model | mc_vit_4_4_32 | mc_vit_4_4_32 |" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()


def test_cifar_and_folders_by_flag(tmp_path: Path) -> None:
    small = ["--epochs", "1", "--depth", "1", "--embed-dim", "16", "--runs-dir", str(tmp_path / "runs")]
    small += ["--attention", "fused"]
    cifar = write_cifar10(tmp_path / "cifar")
    main([*small, "--recipe", "fast-cifar10", "--data-dir", str(cifar)])
    main([*small, "--recipe", "seed-cifar10", "--data-dir", str(cifar), "--model", "c_vit_4_4_32"])
    folder = write_folder(tmp_path / "shapes")
    main([*small, "--dataset", "folder", "--data-dir", str(folder), "--cutout", "8"])
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"cifar10-mc_vit_4_4_32-seed0", "cifar10-c_vit_4_4_32-seed0", "folder-mc_vit_4_4_32-seed0"}


def test_help_names_every_verb_and_groups_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in (
        "eval RUN",
        "compare RUN",
        "--recipe",
        "--exp-name",
        "--save-model-every",
        "--attention",
        "data options",
    ):
        assert word in text, word


def test_python_m_gives_the_line_alone_with_status_2() -> None:
    result = run([sys.executable, "-m", "fastvit_train", "--recipe", "nope"])
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    result = run([sys.executable, "-m", "fastvit_train", "--flip", "up"], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert "invalid choice 'up' for argument '--flip'" in one_line_error(result.stderr)
    result = run([sys.executable, "-m", "fastvit_train", "--epoch", "3"], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert one_line_error(result.stderr) == "unknown flag --epoch; did you mean --epochs?"

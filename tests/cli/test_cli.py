"""The command line: what is asked for happens, mistakes are one line and status 2, nothing is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit_train
from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS
from tests.support import environment, one_line_error, run, write_folder
from tests.support.cifar import write_cifar10


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
        ("--recipe fast", "unknown recipe 'fast'.*allowed: quickstart, upstream-cifar10"),
        ("--recipe", "--recipe takes a value; allowed: a name, such as quickstart"),
        ("--recipe=", "unknown recipe ''; allowed: quickstart"),
        ("--recipe --epochs 3", "--recipe takes a value; allowed: a name, such as quickstart"),
        ("--recipe fast_cifar", "unknown recipe 'fast_cifar' .did you mean fast-cifar10"),
        ("--model mc_vit", "unknown model 'mc_vit' .did you mean mc_vit_4_4_32"),
        ("--attention sdp", "unknown attention implementation 'sdp' .did you mean sdpa.*; allowed: naive"),
        ("--model vit_mini", "unknown model 'vit_mini'"),
        ("--attention flash", "unknown attention implementation 'flash'; allowed: naive, fused, sdpa"),
        ("--dataset mnist", "--dataset 'mnist' is not allowed .did you mean fashion-mnist.*; allowed: digits, cifar10"),
        ("--epoch 3", "unknown flag --epoch; did you mean --epochs"),
        ("--epoch=3", "unknown flag --epoch; did you mean --epochs"),
        ("-epochs 3", "unknown flag -epochs; did you mean --epochs"),
        ("--batch_sise 3", "unknown flag --batch_sise; did you mean --batch-size"),
        ("--batch_size 0", "--batch-size 0 is out of range"),
        ("--batch_size x", "--batch-size 'x' is not allowed; allowed: a whole number"),
        ("--save 3", "unknown flag --save; did you mean --save-every or --save-model-every"),
        ("--xyzzy", "unknown flag --xyzzy; train --help lists the flags"),
        ("--epochs three", "--epochs 'three' is not allowed; allowed: a whole number"),
        ("--epochs", "--epochs takes a value; allowed: a whole number"),
        ("--lr fast", "--lr 'fast' is not allowed; allowed: a number"),
        ("--schedule cosin", "--schedule 'cosin' is not allowed .did you mean cosine.*; allowed: constant, cosine"),
        ("--track tensorboard wand", "--track 'wand' is not allowed .did you mean wandb"),
        ("--compile yes", "--compile takes no value; leave yes out, as in --compile, or --no-compile"),
        ("--no-compile=yes", "--no-compile takes no value; leave yes out, as in --compile, or --no-compile"),
        ("--config", "--config takes a value"),
        ("--qkv-bias yes", "--qkv-bias 'yes' is not allowed; allowed: True, False"),
        ("--epochs 0", "--epochs 0 is out of range; allowed: at least 1, at most 1,000,000"),
        ("--lr -1", "--lr -1.0 is out of range"),
        ("--optimizer adamx", "unknown optimizer 'adamx' .did you mean ada.*; allowed: "),
        ("--patch-size 5", "image size 32x32 is not a multiple of patch size 5"),
        ("--num-heads 5", "num_heads 5 does not divide embed_dim 48"),
        ("--model resnet18 --embed-dim 8", "resnet18 cannot be built with .*embed_dim"),
        ("--num-classes 4", "labels from 0 to 9, but the model has 4 classes"),
        ("--grad-accum 3", "--batch-size 64 is not a multiple of 1 process x 3 micro-batches"),
        ("--weights missing.pth", "missing.pth is not a file"),
        ("--config missing.yaml", "--config missing.yaml can't be read"),
        ("--resume must", "has no checkpoint to resume from"),
        ("--resume sometimes", "--resume 'sometimes' is not allowed; allowed: never, auto, must"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("--dataset cifar10 --data-url http://127.0.0.1:9/x", "can't download .* put cifar-10-python.tar.gz"),
        ("--dataset cifar10 --data-url ftp://x", "can't download ftp://x .not a URL; allowed are http"),
        ("--seed 4294967296", "--seed 4294967296 is out of range"),
        ("--mlp-ratio 0", "--mlp-ratio 0.0 is out of range"),
        (f"--exp-name {'x' * 300}", "is not allowed; allowed: text on one line.*up to 250 bytes between two slashes"),
        (f"--exp-name {'x' * 220}", "is not allowed; allowed: a plain folder name of up to 200 bytes"),
        ("--optimizer adahessian", "optimizer 'adahessian' can't be used: it needs second derivatives"),
        ("--exp-name a/b", "--exp-name 'a/b' is not allowed; allowed: a plain folder name"),
        ("recipes --unknown", "unknown flag --unknown; recipes --help"),
        ("frobnicate", "unknown verb 'frobnicate'; allowed: train, profile, plan, sweep, eval"),
        ("trian --epochs 3", "unknown verb 'trian' .did you mean train"),
        ("--epochs 3 eval", "unknown argument eval; a verb comes first: eval --epochs 3"),
        ("profile --steps 0", "--steps 0 is out of range; allowed: 1 or more"),
        ("profile --output /dev/null/profile", "can't write /dev/null/profile"),
        ("eval", "eval takes a run, as in: eval runs/NAME"),
        ("eval --attention fused", "eval takes a run, as in: eval runs/NAME"),
        ("eval --out x", "unknown flag --out; did you mean --output"),
        ("eval nowhere", "nowhere is not a run"),
        ("export nowhere", "nowhere is not a run"),
        ("export nowhere --to tflite", "--to 'tflite' is not allowed; allowed: onnx, torch-export"),
        ("push nowhere", "push takes a run and a repo, as in: push runs/NAME USER/NAME"),
        ("compare nowhere", "nowhere is not a finished run"),
        ("compare --out x.png", "unknown flag --out; did you mean --output"),
        ("train quux", "unknown argument quux; train --help lists the flags"),
        ("train epochs 3", "unknown argument epochs; did you mean --epochs"),
        ("completion", "completion takes a shell, as in: completion bash; allowed: bash, zsh, fish"),
        ("completion bsh", "shell 'bsh' is not allowed .did you mean bash.*; allowed: bash, zsh, fish"),
        ("recipes fast", "unknown recipe 'fast' .did you mean fast-cifar10"),
        ("recipes quickstart fast-cifar10", "recipes shows one recipe at a time"),
        (
            "models --pattern vit_tinny",
            "--pattern vit_tinny matches no model.*; a . matches any text",
        ),
        (
            "models --pattern vit*",
            "matches .* models, and at most 12 are measured.*narrower pattern, or --no-measure",
        ),
        ("--dry-run --patch-size 5", "image size 32x32 is not a multiple of patch size 5"),
        ("compare", "compare takes the folders of one or more runs"),
        ("--runs-dir /dev/null/runs --attention fused", "can't write /dev/null/runs/digits"),
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
        ("crop: shifts", "crop: 'shifts' in .*my.yaml is not allowed .did you mean shift.*; allowed: none, shift"),
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


@pytest.mark.slow
def test_a_run_can_be_run_again_from_its_saved_configuration(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    small = ["--epochs", "2", "--embed-dim", "16", "--depth", "1", "--seed", "3", "--track", "tensorboard"]
    small += ["--attention", "fused"]  # auto measures for seconds
    main(["--runs-dir", str(runs), "--exp-name", "a", *small])
    main(["train", "--config", str(runs / "a" / "config.yaml"), "--exp-name", "b"])
    first, second = (torch.load(runs / n / "checkpoints/last/optimizer.bin", weights_only=True) for n in "ab")
    assert str(first["state"]) == str(second["state"])
    main(["--config", str(runs / "a" / "config.yaml"), "--resume", "must"])


@pytest.mark.slow
def test_eval_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    main(["--runs-dir", str(runs), "--exp-name", "a", "--epochs", "1", "--depth", "1", "--attention", "sdpa"])
    main(["eval", str(runs / "a"), "--attention", "naive"])
    assert "digits (test, 359 images) accuracy" in capsys.readouterr().out
    main(["compare", str(runs / "a"), str(runs / "a"), "--output", str(tmp_path / "x.png"), "--markdown"])
    assert "| model | mc_vit_4_4_32 | mc_vit_4_4_32 |" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()


@pytest.mark.slow
def test_cifar_and_folders_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--epochs", "1", "--depth", "1", "--embed-dim", "16", "--runs-dir", str(tmp_path / "runs")]
    small += ["--attention", "fused"]
    cifar = write_cifar10(tmp_path / "cifar", monkeypatch)
    main([*small, "--recipe", "fast-cifar10", "--data-dir", str(cifar)])
    main([*small, "--recipe", "upstream-cifar10", "--data-dir", str(cifar), "--model", "c_vit_4_4_32"])
    folder = write_folder(tmp_path / "shapes")
    main([*small, "--dataset", "folder", "--data-dir", str(folder), "--cutout", "8"])
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    recipes = {"fast-cifar10-mc_vit_4_4_32-seed0", "upstream-cifar10-c_vit_4_4_32-seed0"}
    assert names == {*recipes, "shapes-mc_vit_4_4_32-seed0"}


def test_help_names_every_verb_and_groups_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert set(VERBS) <= {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--recipe", "--exp-name", "--save-model-every", "--attention", "run options", "data options"):
        assert word in text, word


@pytest.mark.slow
def test_python_m_gives_the_line_alone_with_status_2() -> None:
    result = run([sys.executable, "-m", "fastvit_train", "--recipe", "nope"])
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    result = run([sys.executable, "-m", "fastvit_train", "--flip", "up"], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert "--flip 'up' is not allowed; allowed: none, random, alternating" in one_line_error(result.stderr)
    result = run([sys.executable, "-m", "fastvit_train", "--epoch", "3"], PYTHONIOENCODING="ascii", LC_ALL="C")
    assert one_line_error(result.stderr) == "unknown flag --epoch; did you mean --epochs?"


@pytest.mark.slow
@pytest.mark.parametrize("args", [["recipes", "quickstart"], ["recipes"], ["--help"]], ids=" ".join)
def test_output_that_nobody_reads_is_no_traceback(args: list[str]) -> None:
    """As in `predict ... --json | head -1`."""
    command = [sys.executable, "-m", "fastvit_train", *args]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"fastvit_train {fastvit_train.__version__}\n"


def test_an_empty_argument_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "predict", "runs/x", "").startswith("an argument is empty; leave it out")

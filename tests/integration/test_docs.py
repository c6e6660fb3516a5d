"""Every command in the README and in SPEEDRUN.md runs, in its order, on small stand-ins for the data it names."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from fastvit_train.cli.main import main
from tests.support import ROOT, write_cifar10, write_fashion_mnist, write_folder

FAST = ["--epochs", "2", "--depth", "1", "--embed-dim", "24", "--num-heads", "6"]
IN_CI = (
    "pip install -e . && accelerate launch -m fastvit_train",
    'pip install -e ".[test]" && pytest',
    "python -m fastvit_train inspect runs/digits-mc_vit_4_4_32-seed0",
)


def commands() -> list[str]:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "SPEEDRUN.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_first_commands_stand_in_the_first_screen_and_ci_runs_them() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:28]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in IN_CI:
        assert command in first_screen and command in script


@pytest.mark.slow
def test_every_other_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data", monkeypatch)
    write_folder(tmp_path / "photos")
    write_folder(tmp_path / "CIFAR-10 (JPEG copy)")
    write_fashion_mnist(tmp_path / "data", np.zeros((30, 28, 28)), np.zeros((10, 28, 28)), packed=True)
    ran = [command for command in commands() if command not in IN_CI]
    assert len(ran) >= 12
    for number, command in enumerate(ran):
        print(command)
        before, _, arguments = command.partition("-m fastvit_train")
        assert before.startswith(("accelerate launch", "python ")), f"nothing runs this command: {command}"
        args = shlex.split(arguments)
        if before.startswith("accelerate"):
            args += FAST if "--resume" in args else [*FAST, "--stop-after", "1"]
            args += [] if "--attention" in args else ["--attention", "fused"]  # auto measures for seconds
            args += [] if "--exp-name" in args else ["--exp-name", f"readme-{number}"]
        if args[0] in ("profile", "plan"):
            args += ["--steps", "1", "--depth", "1", "--attention", "fused"]
        main(args)


@pytest.mark.slow
def test_the_librarys_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [re.findall("import (.*)", example)[0] for example in examples] == ["train", "evaluate", "load_run"]
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    text = capsys.readouterr().out
    assert "of digits after 3 epochs" in text and "calibration error" in text and "torch.Size([4, 8, 8])" in text


def test_the_operators_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "kernels" / "README.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "kernels/README.md", "exec"), {})
    assert "'naive': None" in capsys.readouterr().out

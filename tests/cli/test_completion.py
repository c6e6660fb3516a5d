"""The scripts complete in the shells themselves."""

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvit_train.cli.flags import options
from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS
from fastvit_train.config.recipes import RECIPES
from fastvit_train.models import OUR_MODELS

CASES = [
    (["ev"], {"eval"}),
    (["--rec"], {"--recipe"}),
    (["--recipe", "fas"], {"fast-cifar10"}),
    (["train", "--recipe", ""], set(RECIPES)),
    (["--model", ""], set(OUR_MODELS)),
    (["--dataset", "ci"], {"cifar10", "cifar100"}),
    (["--epochs", "3", "--attention", "sd"], {"sdpa"}),
    (["eval", "--att"], {"--attention"}),
    (["eval", "runs/a", "--attention", "f"], {"fused"}),
    (["eval", "--rec"], set()),
    (["completion", ""], {"bash", "zsh", "fish"}),
    (["recipes", "upstream-cifar100"], {"upstream-cifar100"}),
]


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Path]:
    def write(shell: str) -> Path:
        main(["completion", shell])
        path = tmp_path / f"fastvit.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return write


def answer(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@needs("bash")
def test_bash(script: Callable[[str], Path], tmp_path: Path) -> None:
    path = script("bash")
    cases = [
        *CASES,
        ([""], set(VERBS)),
        (["--"], set(options(VERBS["train"][0]))),
        (["--recipe", "=", "fas"], {"fast-cifar10"}),
    ]
    for words, expected in cases:
        code = (
            f'source {path}; COMP_WORDS=(fastvit "$@"); COMP_CWORD=$#; _fastvit; '
            'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
        )
        assert set(answer(["bash", "-c", code, "bash", *words])) == expected, words
    registered = answer(["bash", "-c", f"source {path}; complete -p fastvit"])
    assert registered == ["complete -o bashdefault -o default -F _fastvit fastvit"]  # files where there are no words


@needs("fish")
def test_fish(script: Callable[[str], Path]) -> None:
    path = script("fish")
    for words, expected in CASES:
        found = answer(["fish", "--no-config", "-c", f"source {path}; complete -C 'fastvit {' '.join(words)}'"])
        assert {line.partition("\t")[0] for line in found} == expected, words


@needs("zsh")
def test_zsh(script: Callable[[str], Path]) -> None:
    path = script("zsh")
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "HOME": str(path.parent)}
    shell = subprocess.Popen(
        ["zsh", "-fi"], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
    )
    os.close(theirs)
    try:
        os.write(ours, f"fastvit() {{ print -r -- \"[$*]\" }}; source {path}; echo rea''dy\n".encode())
        _read_until(ours, "ready\r")
        for typed, completed in (
            ("ev", "eval"),
            ("--recipe fas", "--recipe fast-cifar10"),
            ("eval --att", "eval --attention"),
        ):
            os.write(ours, f"fastvit {typed}\t\n".encode())
            _read_until(ours, f"[{completed}]")
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


def _read_until(terminal: int, text: str, seconds: float = 30) -> None:
    read, end = b"", time.monotonic() + seconds
    while text.encode() not in read:
        assert time.monotonic() < end, read
        if select.select([terminal], [], [], 1)[0]:
            read += os.read(terminal, 4096)


def test_the_script_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        main(["completion", shell])
        assert f"#   fastvit completion {shell} > ~/" in capsys.readouterr().out

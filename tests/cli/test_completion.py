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

from fastvit_train.cli.flags import option_names
from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS
from fastvit_train.config.names import MODELS
from fastvit_train.config.recipes import RECIPES

CASES = [
    (["ev"], {"eval"}),
    (["--rec"], {"--recipe"}),
    (["--recipe", "qui"], {"quickstart"}),
    (["train", "--recipe", ""], set(RECIPES)),
    (["--model", ""], set(MODELS)),
    (["plan", "--models", "mc_vit_4"], {"mc_vit_4_4_32"}),
    (["--dataset", "ci"], {"cifar10", "cifar100"}),
    (["--optimizer", "adah"], {"adahessian"}),
    (["--epochs", "3", "--attention", "sd"], {"sdpa"}),
    (["eval", "--att"], {"--attention"}),
    (["eval", "runs/a", "--attention", "f"], {"fused"}),
    (["completion", ""], {"bash", "zsh", "fish", "-h", "--help"}),
    (["recipes", "upstream-cifar100"], {"upstream-cifar100"}),
    (["eval", "weigh"], {"weights.txt"}),
    (["--weights", "weigh"], {"weights.txt"}),
]
"""the words typed after the program, and what they are completed to in a folder with the file weights.txt"""


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


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights.txt").touch()
    monkeypatch.chdir(tmp_path / "files")


def output_lines(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@needs("bash")
def test_bash(script: Callable[[str], Path]) -> None:
    path = script("bash")
    own_flags = set(option_names(VERBS["train"][0]))
    cases = [
        *CASES,
        ([""], {*VERBS, *own_flags, "-h"}),
        (["--"], own_flags),
        (["--recipe", "=", "qui"], {"quickstart"}),
        (["--recipe", "="], set(RECIPES)),
        (["eval", "--rec"], set()),
    ]
    for words, expected in cases:
        # Like bash itself: where the function answers nothing, -o default completes files.
        code = (
            f'source {path}; COMP_WORDS=(fastvit "$@"); COMP_CWORD=$#; cur=${{!#}}; _fastvit; '
            '[[ ${#COMPREPLY[@]} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$cur")); '
            'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
        )
        assert set(output_lines(["bash", "-c", code, "bash", *words])) == expected, words
    registered = output_lines(["bash", "-c", f"source {path}; complete -p fastvit"])
    assert registered == ["complete -o bashdefault -o default -F _fastvit fastvit"]


@needs("fish")
def test_fish(script: Callable[[str], Path]) -> None:
    path = script("fish")
    for words, expected in CASES:
        lines = output_lines(["fish", "--no-config", "-c", f"source {path}; complete -C 'fastvit {' '.join(words)}'"])
        assert {line.partition("\t")[0] for line in lines} == expected, words


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
            ("--recipe qui", "--recipe quickstart"),
            ("eval --att", "eval --attention"),
            ("recipes upstream-cifar100", "recipes upstream-cifar100"),
            ("eval weigh", "eval weights.txt"),
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


@pytest.mark.slow
def test_the_script_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        main(["completion", shell])
        head = capsys.readouterr().out.splitlines()[:5]
        assert any(line.startswith("#   ") and f"fastvit completion {shell} > ~/" in line for line in head)

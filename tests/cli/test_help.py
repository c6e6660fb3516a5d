"""Help: an overview of a screen, flags as they are declared, and colours in a terminal alone."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fastvit_train.cli.flags import flags_of, option_names
from fastvit_train.cli.main import main
from fastvit_train.cli.overview import overview
from fastvit_train.cli.verbs import VERBS
from fastvit_train.config.validation import DATASETS
from tests.reliability.malformed import TINY
from tests.support import ROOT, environment, one_line_error

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
MISTAKE = (
    f"--dataset 'mnist' is not allowed (did you mean fashion-mnist?); allowed: {', '.join(DATASETS)}, or hf:USER/NAME"
)
WORDS = f"""
import sys
from fastvit_train.cli.main import main
for args in (["--help"], ["eval", "--help"], ["recipes"], ["--dataset", "mnist"], {list(TINY)!r}):
    try:
        main(args)
    except SystemExit:
        pass
    print("=====", flush=True)
"""


def test_the_overview_fits_a_screen_whatever_the_program_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for called, program in (
        ("/usr/bin/fastvit", "fastvit"),
        ("/x/fastvit_train/__main__.py", "python -m fastvit_train"),
    ):
        monkeypatch.setattr(sys, "argv", [called, "--help"])
        main()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"usage: {program} [VERB] [FLAGS]"
        assert len(lines) <= 23 and max(map(len, lines)) <= 80  # and the prompt
        assert f"{program} VERB --help" in lines[-1]
        with pytest.raises(SystemExit):
            main(["eval", "-h"])
        assert capsys.readouterr().out.startswith(f"usage: {program} eval [-h]")


def test_thirteen_verbs_with_much_to_say_fit_as_well() -> None:
    class Verb:
        """What it does, and why, and how, and for whom, explained in a line that is too long for one line of a screen.

        More.
        """

    console = Console(width=80, file=io.StringIO())
    console.print(overview("python -m fastvit_train", {f"verb{i}": Verb for i in range(13)}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 23 and sum(line.rstrip().endswith(" ...") for line in lines) == 13


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_read_from_the_declarations_is_what_the_parser_takes(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    takes, _ = VERBS[verb]
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    heads = re.findall(r"^\W*(?:-h, )?(--[a-z].*)$", capsys.readouterr().out, re.MULTILINE)
    shown = {
        name for head in heads for name in re.findall(r"(?<!\S)--[a-z][a-z0-9-]+(?=[ ,]|$)", head.partition("  ")[0])
    }
    assert shown == set(option_names(takes))
    assert all(flag.allowed for flag in flags_of(takes))


@pytest.fixture(scope="module")
def in_a_terminal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What a terminal is sent by help, a table, a mistake and a training; with NO_COLOR as given."""
    said: dict[str, str] = {}

    def start(no_color: str) -> threading.Thread:
        folder = tmp_path_factory.mktemp("terminal")
        env = environment(NO_COLOR=no_color, TERM="xterm-256color", PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")

        def run() -> None:
            said[no_color] = _said_to_a_terminal([sys.executable, "-c", WORDS], folder, env)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    for thread in [start("1"), start("")]:
        thread.join()
    return lambda no_color: said[no_color].replace("\r\n", "\n").split("=====")


def _said_to_a_terminal(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's end of file
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.slow
def test_colours_in_a_terminal(in_a_terminal: Callable[[str], list[str]]) -> None:
    overview_, help_, _, error, training, _ = in_a_terminal("")
    assert COLOUR.search(overview_) and COLOUR.search(help_) and COLOUR.search(training)
    assert one_line_error(error) == MISTAKE


@pytest.mark.slow
def test_no_colours_under_no_color(in_a_terminal: Callable[[str], list[str]]) -> None:
    parts = in_a_terminal("1")
    assert not COLOUR.search("".join(parts))
    assert "\x1b" not in parts[1] and "--attention" in parts[1]
    assert "epoch 1/1" in parts[4]  # the progress bar is there
    assert one_line_error(parts[3]) == MISTAKE


@pytest.mark.slow
def test_nothing_but_text_in_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args in (["--help"], ["eval", "--help"], ["recipes"], ["--epoch"], [*TINY, "--runs-dir", str(tmp_path)]):
        with contextlib.suppress(SystemExit):
            main(args)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "usage: " in captured.out and "epoch   1/1" in captured.out

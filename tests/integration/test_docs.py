"""The pages are right: every command and example runs in the order given, and every link and path exists."""

import functools
import http.client
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser

from fastvit_train.cli.main import main
from fastvit_train.cli.verbs import VERBS
from fastvit_train.runs.run_names import default_group
from tests.support import ROOT, environment, write_fashion_mnist, write_folder
from tests.support.cifar import write_cifar10
from tests.support.pages import (
    ALL_PAGES,
    BENCH_PAGES,
    DOCS,
    PAGES,
    blocks,
    commands,
    page_name,
    relative_links,
)
from tests.support.parquet import write as write_parquet
from tests.support.tars import write as write_shards

MODULE = "-m fastvit_train"
REDIRECTED = " > "
"""before the file that a command writes its output to"""
FIRST_COMMAND = "pip install -e . && accelerate launch -m fastvit_train"
FIRST_RUN = "digits-mc_vit_4_4_32-seed0"
IN_CI = (FIRST_COMMAND, 'pip install -e ".[test]" && pytest', f"python -m fastvit_train inspect runs/{FIRST_RUN}")
SMALL = ["--epochs", "2", "--depth", "1", "--embed-dim", "24", "--num-heads", "6"]
MAX_README_LINES = 160


def test_the_first_commands_are_in_the_first_screen_and_ci_runs_them() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:28]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in IN_CI:
        assert command in first_screen and command in script


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_readmes_table_is_what_compare_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on the page about CIFAR-10, with the results that are kept here."""
    command = next(line for line in commands(ROOT / "docs" / "cifar10.md", "bash") if "--markdown" in line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(ROOT / "bench" / "results" / "cifar10")
    main(shlex.split(command.partition(MODULE)[2]))
    *table, _ = capsys.readouterr().out.splitlines()
    readme = (ROOT / "README.md").read_text()
    assert len(table) == 10 and "\n".join(table) in readme.replace("**", "")


@pytest.mark.parametrize("page", [*ALL_PAGES, *BENCH_PAGES], ids=page_name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in relative_links(page):
        assert (page.parent / target).is_file(), f"{page_name(page)} links to {target}"


def test_every_page_is_listed_in_the_site_and_in_the_list_of_pages() -> None:
    site = (ROOT / "docs" / "index.rst").read_text().split()
    listed = relative_links(ROOT / "docs" / "README.md")
    for page in DOCS:
        assert page.stem in site
        assert page.name in listed or page.name == "README.md"


def test_the_architecture_page_names_every_package_and_only_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = {path.parent.name for path in (ROOT / "fastvit_train").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` ", text, re.MULTILINE)) == packages
    for name in re.findall(r"`(\w+/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file() or (ROOT / "fastvit_train" / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_has_valid_flags(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page, "bash", "sh"):
        check_launch_flags(command)
        read_flags(command)


def test_no_page_trains_into_a_folder_that_another_command_has_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads several pages runs all of their commands in one folder."""
    monkeypatch.chdir(tmp_path)
    used: dict[str, str] = {}
    for page in PAGES:
        for command in commands(page, "bash"):
            train = read_flags(command)
            if not isinstance(train, VERBS["train"][0]) or "--resume" in command or "--dry-run" in command:
                continue
            folder = run_name(train)
            assert folder not in used, f"{command} trains into the folder of {used[folder]}"
            used[folder] = command


def run_name(train: Any) -> str:
    """The name of the first folder that a training writes to."""
    name = train.run.exp_name or default_group(train)
    return f"{name}-seed{train.run.seed}" if train.repeat > 1 or train.run.exp_name is None else name


@pytest.fixture(scope="module")
def after_first_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the run that the README's first command leaves, and stand-ins for the data that pages name."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        write_cifar10(folder / "data", patch)
        write_fashion_mnist(folder / "data", np.zeros((30, 28, 28)), np.zeros((10, 28, 28)), packed=True)
        write_folder(folder / "photos")
        write_parquet(folder / "animals")
        write_shards(folder / "shards")
        write_folder(folder / "CIFAR-10 (test images partly JPEG)")
        write_folder(folder / "CIFAR-10 (lossless test images)")
        (folder / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
        main([*SMALL, "--attention", "fused", "--runs-dir", str(folder / "runs")])
        assert (folder / "runs" / FIRST_RUN / "summary.json").is_file()
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "kernels"], ids=page_name)
def test_every_command_and_example_runs_in_order(
    page: Path,
    after_first_command: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each page starts after the README's first command."""
    shutil.copytree(after_first_command, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "home").mkdir()
    for block in blocks(page, "bash", "python"):
        if block.language == "python":
            exec(compile(block.text, page_name(page), "exec"), {})
            continue
        for command in block.commands:
            print(command)
            run_command(command)
    if page.name == "python.md":
        text = capsys.readouterr().out
        assert "of digits after 3 epochs" in text and "calibration error" in text and "torch.Size([4, 8, 8])" in text


@pytest.mark.slow
def test_the_examples_of_the_operator_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks(ROOT / "kernels" / "README.md", "python")
    assert len(examples) == 2
    for example in examples:
        exec(compile(example.text, "kernels/README.md", "exec"), {})
    assert "'naive': None" in capsys.readouterr().out


def program_args(command: str) -> list[str] | None:
    """The arguments that a command gives to this program; None if it starts another one."""
    command = command.partition(REDIRECTED)[0]
    if MODULE in command:
        return shlex.split(command.partition(MODULE)[2])
    words = shlex.split(command)
    if words[0] == "fastvit":
        return words[1:]
    return words[words.index("accelerate_configs/slurm.sh") + 1 :] if words[0] == "sbatch" else None


def check_launch_flags(command: str) -> None:
    """Fail unless accelerate's launcher knows every flag before `-m fastvit_train`, and its file exists."""
    words = shlex.split(command.partition(MODULE)[0])
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args([*words[2:], "script"])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), command


@functools.cache
def read_flags(command: str) -> Any:
    """What the command line reads from a command of this program; no verb runs. None if it starts another program."""
    args = program_args(command)
    if args is None:
        return None
    if "--config" in args:  # an earlier command would have written it
        path = Path(args[args.index("--config") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("recipe: quickstart\n")
    if "--init-from" in args:
        run = Path(args[args.index("--init-from") + 1])
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text("recipe: quickstart\n")
        (run / "model.safetensors").touch()
    read: list[Any] = [None]
    with pytest.MonkeyPatch.context() as patch:
        for verb, (takes, _) in list(VERBS.items()):
            patch.setitem(VERBS, verb, (takes, read.append))
        run_main(args, command)
    return read[-1]


def run_main(args: list[str], command: str) -> None:
    """The command line in this process, which must end with status 0."""
    try:
        main(args)
    except SystemExit as stop:
        assert not stop.code, f"{command} ended with status {stop.code}"


def watch_until_it_answers(args: list[str]) -> None:
    """A page's `watch`, on a port that is free: it sends its page, and Ctrl-C ends it."""
    command = [sys.executable, "-m", "fastvit_train", *args, "--port", "0"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://(127\.0\.0\.1:\d+)/", process.stdout.readline())
            assert address is not None
            connection = http.client.HTTPConnection(address[1], timeout=60)
            connection.request("GET", "/")
            answer = connection.getresponse()
            assert answer.status == 200 and b"<html" in answer.read()
            connection.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def run_command(command: str) -> None:
    """A page's command: this program's verbs in this process and made small, all else in bash."""
    if command in IN_CI or command.startswith("pip install -e "):
        return
    args = program_args(command)
    if args is None or MODULE not in command or REDIRECTED in command:
        subprocess.run(["bash", "-ec", command], check=True, timeout=300)
        return
    if args[:1] == ["watch"]:
        watch_until_it_answers(args)
        return
    trains = not args or args[0].startswith("-")
    if trains and not {"--dry-run", "--preview"} & set(args):
        args += SMALL if "--resume" in args else [*SMALL, "--stop-after", "1"]
        args += [] if "--attention" in args else ["--attention", "fused"]  # auto measures for seconds
    elif trains:
        args += [*SMALL, "--attention", "fused"]
    elif args[0] in ("profile", "plan"):
        args += ["--steps", "1", "--depth", "1", "--attention", "fused"]
    elif args[0] == "sweep":
        args += [*SMALL[2:], "--attention", "fused"]
    run_main(args, command)

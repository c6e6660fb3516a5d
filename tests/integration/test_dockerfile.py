"""The Dockerfile is linted, and its steps are run without Docker.

What is replaced: the paths of the image lie in a temporary folder, its base is this machine, packages of the system are
only looked up, and the user is not made. The virtual environment sees the packages of this one, so that pip finds the
dependencies there instead of downloading gigabytes. The files come from what .dockerignore lets through; the package is
built, installed and started for real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, environment, run

DOCKERFILE = ROOT / "Dockerfile"
FOLDERS = ("/src", "/opt/fastvit", "/work")
"""folders of the image"""
SHORT = ("--epochs", "1", "--depth", "1", "--embed-dim", "16", "--num-heads", "2", "--attention", "fused")


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction and its arguments."""
    code = re.sub(r"^ *#.*\n", "", dockerfile, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


def write_context(folder: Path) -> None:
    """Copy what .dockerignore lets through, which is all that `docker build` would see."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*", "everything is left out but what follows"
    for name in (line[1:] for line in lines if line.startswith("!")):
        copy(ROOT / name, folder / name)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


class Image:
    """What the steps of a Dockerfile make of a folder that stands for the image."""

    def __init__(self, folder: Path, context: Path) -> None:
        self.root, self._context = folder, context
        self.workdir = folder
        self.user, self.entrypoint = "root", [""]
        self.env = {key: value for key, value in environment().items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"

    def step(self, name: str, arguments: str) -> None:
        """Follow an instruction; one that this does not know fails."""
        match name:
            case "FROM" | "ARG" | "VOLUME":
                pass
            case "ENV":
                values = dict(word.split("=", 1) for word in arguments.split())
                for key, value in values.items():
                    self.env[key] = self._place(value).replace("$PATH", self.env["PATH"])
            case "WORKDIR":
                self.workdir = Path(self._place(arguments))
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = arguments.split()
                for source in sources:
                    copy(self._context / source, self.workdir / (source if target == "./" else target))
            case "RUN" if "apt-get" in arguments:
                check_system_packages(re.findall(r"--no-install-recommends ([^;&]+)", arguments))
            case "RUN" if arguments.startswith("useradd"):
                assert "--home-dir /work" in arguments
                (self.root / "work").mkdir(parents=True)
            case "RUN":
                for command in arguments.split(" && "):
                    self.run(["sh", "-ec", self._place(command)])
                    if "-m venv" in command:
                        self._show_packages_of_this_environment()
            case "USER":
                self.user = arguments
            case "ENTRYPOINT":
                self.entrypoint = json.loads(arguments)
            case _:
                raise AssertionError(f"the test does not know {name}")

    def run(self, command: list[str]) -> str:
        """Run a command in the image; returns what it prints."""
        done = subprocess.run(command, cwd=self.workdir, env=self.env, capture_output=True, text=True, timeout=900)
        if "No matching distribution found for hatchling" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _place(self, text: str) -> str:
        return re.sub(rf"(?<![\w/])({'|'.join(FOLDERS)})\b", rf"{self.root}\1", text)

    def _show_packages_of_this_environment(self) -> None:
        (packages,) = (self.root / "opt" / "fastvit").glob("lib/python*/site-packages")
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "outer.pth").write_text("\n".join(outer))


def check_system_packages(lists: list[str]) -> None:
    """Fail unless apt knows the packages. Without apt, or if apt does not even know g++, nothing is checked."""
    names = " ".join(lists).split()
    assert "g++" in names
    if shutil.which("apt-cache") and run(["apt-cache", "show", "g++"]).returncode == 0:
        for name in names:
            assert run(["apt-cache", "show", name]).returncode == 0, name


def build(dockerfile: str, folder: Path) -> Image:
    """Follow all instructions."""
    write_context(folder / "context")
    image = Image(folder / "image", folder / "context")
    for name, arguments in instructions(dockerfile):
        image.step(name, arguments)
    return image


def hadolint() -> str:
    """The linter, which the extra `test` installs next to this Python."""
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed")
    return found


def test_it_is_linted() -> None:
    done = run([hadolint(), "--no-color", "--failure-threshold", "style", str(DOCKERFILE)])
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("--yes --no-install-recommends g++", "g++"))
    done = run([hadolint(), "--no-color", "--failure-threshold", "style", str(wrong)])
    assert done.returncode == 1 and "DL3014" in done.stdout and "DL3015" in done.stdout


@pytest.mark.slow
def test_the_steps_make_an_image_that_trains(tmp_path: Path) -> None:
    image = build(DOCKERFILE.read_text(), tmp_path)
    assert image.user == "10001" and image.workdir == image.root / "work" == Path(image.env["HOME"])
    where = "import fastvit_train, fastvit_kernels as kernels; print(fastvit_train.__file__, kernels.__file__)"
    for path in image.run(["python", "-c", where]).split():
        assert Path(path).is_relative_to(image.root / "opt" / "fastvit"), "it is not the installed package"
    image.run([*image.entrypoint, "train", *SHORT, "--exp-name", "docker"])
    assert (image.root / "work" / "runs" / "docker" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["COPY README.md LICENSE ./", "COPY fastvit_train fastvit_train"])
def test_a_file_that_is_not_copied_is_missed(missing: str, tmp_path: Path) -> None:
    dockerfile = DOCKERFILE.read_text()
    assert missing in dockerfile
    with pytest.raises(AssertionError, match="pip install"):
        build(dockerfile.replace(missing, ""), tmp_path)


@pytest.mark.parametrize("name", ["LICENSE", "fastvit_train", "kernels/fastvit_kernels"])
def test_what_is_copied_must_not_be_ignored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tmp_path / "context"
    write_context(context)
    copied = [word for step, words in instructions(DOCKERFILE.read_text()) if step == "COPY" for word in words.split()]
    assert name in copied and (context / name).exists()

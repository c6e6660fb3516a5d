"""Every text file is written and read as UTF-8, whatever the locale says."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvit_train.config.schema import TrainConfig
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError
from tests.support import ROOT

SOURCES = sorted(path for name in ("fastvit_train", "kernels", "bench") for path in (ROOT / name).rglob("*.py"))
TEXT = {"open", "fdopen", "read_text", "write_text", "TextIOWrapper"}
"""what opens a file as text unless a mode says otherwise"""
BINARY = {"os", "Image", "gzip", "tarfile", "zipfile"}
"""modules whose `open` opens a file as bytes"""


def calls_without_encoding(source: str) -> Iterator[ast.Call]:
    """Yield the calls that open a file or the pipes of a process as text without naming the encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or "encoding" in {keyword.arg for keyword in call.keywords}:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        keywords = {keyword.arg: getattr(keyword.value, "value", True) for keyword in call.keywords}
        if name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
            is_method = name == "open" and isinstance(call.func, ast.Attribute)
            args = call.args[0 if is_method or name.endswith("File") else 1 :]
            mode = keywords.get("mode", getattr(args[0], "value", "") if args else None)
            module = getattr(getattr(call.func, "value", None), "id", "")
            default = "w+b" if name.endswith("File") else "r"
            is_text = "b" not in (default if mode is None else str(mode)) and not (is_method and module in BINARY)
        else:
            is_text = name in TEXT or keywords.get("text") is True or keywords.get("universal_newlines") is True
        if is_text:
            yield call


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_opened_in_the_encoding_of_the_locale(path: Path) -> None:
    lines = [call.lineno for call in calls_without_encoding(path.read_text(encoding="utf-8"))]
    assert lines == [], f'{path}, lines {lines}: say encoding="utf-8"'


def test_the_check_finds_each_way_to_open_a_text_file() -> None:
    text = (
        'open(p)', 'open(p, "w")', 'path.open()', 'path.open("a")', "path.read_text()", 'path.write_text("b")',
        'os.fdopen(1, "w")', "subprocess.run(c, text=True)", "Popen(c, universal_newlines=True)", "TemporaryFile('w+')",
        'open(p, mode="w")', "TextIOWrapper(b)",
    )  # fmt: skip
    assert all(list(calls_without_encoding(line)) for line in text)
    other = (
        'open(p, "rb")',
        'path.open("ab")',
        "Image.open(p)",
        "gzip.open(p)",
        "TemporaryFile(dir=d)",
        'open(p, "w", encoding="utf-8")',
    )
    assert not any(list(calls_without_encoding(line)) for line in other)


def test_bytes_that_are_not_text_are_escaped(tmp_path: Path) -> None:
    """The name of a file that the locale cannot decode holds such bytes."""
    name = b"caf\xc3".decode("ascii", "surrogateescape")
    atomic_io.write_atomically(tmp_path / "file", name)
    atomic_io.append(tmp_path / "file", name)
    assert (tmp_path / "file").read_text(encoding="utf-8") == r"caf\udcc3" * 2


@pytest.fixture(params=["C", "latin-1"])
def locale(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a locale that is not UTF-8, in which Python does not choose UTF-8 itself."""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if request.param == "C":
        return {**plain, "LC_ALL": "C"}
    command = ["localedef", "-i", "fr_FR", "-f", "ISO-8859-1", str(tmp_path / "fr_FR")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the locale cannot be made")
    return {**plain, "LC_ALL": "fr_FR", "LOCPATH": str(tmp_path)}


VERBS = """
import locale, sys
from fastvit_train.cli.main import main

assert locale.getencoding().lower().replace("-", "") not in ("utf8", "utf_8"), locale.getencoding()
data, runs = sys.argv[1:]
run = f"{runs}/run"
small = "--epochs 2 --batch-size 4 --embed-dim 16 --depth 1 --num-heads 2 --patch-size 8 --attention fused".split()
train = ["--dataset", "folder", "--data-dir", data, "--runs-dir", runs, "--exp-name", "run", *small]
main(["train", *train, "--stop-after", "1"])
main(["train", *train, "--resume", "must"])
main(["train", "--config", f"{run}/config.yaml", "--exp-name", "two", "--epochs", "1"])
main(["eval", run])
main(["report", run])
main(["compare", run, "--output", f"{run}/both.png"])
main(["push", run, "me/model", "--dry-run"])
main(["recipes", "quickstart"])
"""


@pytest.mark.slow
def test_a_run_in_a_locale_that_is_not_utf8(locale: dict[str, str], tmp_path: Path) -> None:
    """A class is named café, and so is the folder of the data set in the locale that has the letter."""
    is_ascii = locale["LC_ALL"] == "C"
    encoding = "utf-8" if is_ascii else "latin-1"
    data = tmp_path / ("photos" if is_ascii else "caf\u00e9s")
    for split in ("train", "test"):
        for kind in ("caf\u00e9", "th\u00e9"):
            folder = os.fsencode(data / split) + b"/" + kind.encode(encoding)
            os.makedirs(folder)
            for number in range(4):
                image = Image.effect_noise((32, 32), 80).convert("RGB")
                with open(folder + b"/%d.png" % number, "wb") as file:
                    image.save(file, "PNG")
    done = subprocess.run(
        [sys.executable, "-c", VERBS, str(data), str(tmp_path / "runs")],
        env={**os.environ, **locale, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    words = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0 and "Traceback" not in words, words
    runs = sorted(path for path in (tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        for path in run.rglob("*"):
            if path.suffix in (".yaml", ".json", ".jsonl", ".md", ".html", ".log"):
                path.read_text(encoding="utf-8")
        RunFolder(run).read_config()
        names = json.loads((run / "config.json").read_text(encoding="utf-8"))["label_names"]
        assert names == ["caf\u00e9", "th\u00e9"]


def test_a_run_whose_path_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match=r"caf\\udce9 is not UTF-8.*; choose another --exp-name or --runs-dir"):
        folder.should_resume(TrainConfig(), "never", overwrite=False)

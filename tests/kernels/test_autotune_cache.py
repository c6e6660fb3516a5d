"""What `auto` has measured is read from a file, unless something has changed that it depends on."""

import os
from pathlib import Path

import pytest
import torch

import fastvit_kernels
from fastvit_kernels.autotune import cache, chooser
from fastvit_kernels.autotune import choice as choice_module
from fastvit_kernels.fused import fused_attention
from tests.kernels.autotune_cases import CASE, broken, only, slow


def cache_files() -> list[Path]:
    folder = Path(os.environ["XDG_CACHE_HOME"])
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_second_start_reads_what_the_first_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, other=slow)
    first = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    (path,) = cache_files()
    chooser._choices.clear()
    monkeypatch.setattr(chooser, "measure", None)
    second = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert (second.name, second.samples, second.unsupported) == (first.name, first.samples, first.unsupported)
    assert str(second).endswith(f" (measured before, in {path})")


@pytest.mark.parametrize(
    "what",
    ["shape", "heads", "dtype", "bias", "dropout", "mode", "autocast", "threads", "version", "available", "processor"],
)
def test_what_the_times_depend_on_is_measured_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    first = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert first.file is None
    chooser._choices.clear()
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    elif what == "version":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "available":
        only(monkeypatch, other=fused_attention)
    elif what == "processor":
        monkeypatch.setattr(cache, "processor", lambda: "another")
    shape = (2, 6, 16) if what == "shape" else (2, 5, 16)
    dtype = torch.float64 if what == "dtype" else torch.float32
    options = {"has_bias": what != "bias", "dropout_p": 0.1 * (what == "dropout"), "dtype": dtype, "device": "cpu"}
    options |= {"mode": "traced"} if what == "mode" else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        again = fastvit_kernels.choose(shape, 4 if what == "heads" else 2, **options)
    assert again.file is None
    assert len(cache_files()) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 10**5,
        '{"samples": {}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"fused": [1, 2]}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"fused": [1, 2, NaN]}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"fused": [1, 2, 1e999]}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"fused": "123x"}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"gone": [1, 2, 3]}, "unsupported": {}, "compile_seconds": 0}',
        '{"samples": {"fused": [1, 2, 3]}, "unsupported": [], "compile_seconds": 0}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_cache_file_is_measured_again_and_replaced(
    content: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    (path,) = cache_files()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    chooser._choices.clear()
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).file is None
    chooser._choices.clear()
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).file == path
    assert cache_files() == [path]


@pytest.mark.parametrize("place", ["/dev/null/cache", "relative"])
def test_a_cache_that_cannot_be_written_is_not_needed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", "/dev/null")
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).name == "fused"
    assert not list(tmp_path.iterdir())


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, bad=broken)
    with pytest.warns(UserWarning, match="leaves out bad"):
        fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert not cache_files()


def test_processes_that_start_together_agree_with_the_first_to_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, other=fused_attention)
    case = choice_module.Case(
        (2, 5, 16), 2, torch.float32, torch.float32, True, 0.0, torch.device("cpu"), None, "eager"
    )
    theirs = choice_module.Choice("case", {"fused": (1.0, 1.0, 1.0), "other": (2.0, 2.0, 2.0)}, 0.0)

    def measure_while_another_process_finishes(case: choice_module.Case) -> choice_module.Choice:
        cache.write(case, theirs)
        return choice_module.Choice("case", {"fused": (2.0, 2.0, 2.0), "other": (1.0, 1.0, 1.0)}, 0.0)

    monkeypatch.setattr(chooser, "measure", measure_while_another_process_finishes)
    assert cache.read(case) is None
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).name == "fused"

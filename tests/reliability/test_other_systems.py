"""Windows, macOS and Apple's GPUs, as far as they can be simulated on Linux: what they lack, and what they refuse."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastvit_kernels
from fastvit_train.config import windows
from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.decode import ImageFiles
from fastvit_train.data.images import StreamedImages
from fastvit_train.runs.run_folder import RunFolder
from fastvit_train.training.display.progress_bar import ProgressBar
from fastvit_train.training.loop import train_epoch
from fastvit_train.training.setup import setup
from fastvit_train.utils import atomic_io
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.torch_private import TorchDispatchMode
from tests.support import ROOT, rgb, run, write_folder

Config = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "system", [pytest.param("win32", marks=pytest.mark.slow), pytest.param("darwin", marks=pytest.mark.soak)]
)
def test_the_program_on_another_system(system: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    data, runs = write_folder(tmp_path / "data"), tmp_path / "runs"
    script = [sys.executable, "-m", "tests.support.other_systems", system, str(data), str(runs)]
    done = run(script, ROOT, OMP_NUM_THREADS="1")
    words = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in words, words
    assert words.count("this operating system can't fork processes that load images") == 1
    checkpoints = runs / "run" / "checkpoints"
    assert (checkpoints / "last").resolve().name == "last" if system == "win32" else (checkpoints / "last").is_symlink()
    assert atomic_io.link_target(checkpoints / "last") == max(checkpoints.glob("step_*"), key=lambda path: path.name)
    assert (runs / "sweep" / "trial-0001" / "summary.json").is_file()
    kernel_is_missing = "their kernel is written for GCC and Clang, and torch compiles with MSVC" in words
    assert kernel_is_missing == (system == "win32")


@pytest.mark.parametrize(
    "name",
    ["con", "NUL", "com1", "lpt9.txt", "aux .x", "a:b", "what?", "a*", "a|b", "<a>", 'say "a"', "a.", "a "],
)
def test_a_name_that_windows_cannot_have(
    name: str, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = RunFolder(tmp_path / name), small_config()
    assert not folder.should_resume(config, "never", overwrite=False)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="^Windows can't have a folder named .*; choose another --exp-name") as caught:
        folder.should_resume(config, "never", overwrite=False)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["console", "nullable", "com", "com10", "a.b", ".a", "lpt", "digits-mc_vit-seed0"])
def test_a_name_that_windows_can_have(name: str) -> None:
    assert windows.why_refused(Path("/runs") / name) is None


@pytest.mark.slow
def test_a_path_that_is_too_long_for_windows(trained: Path) -> None:
    longest = "/" + "/".join(["r" * 88] * 2)
    assert len(longest) == windows.MAX_PATH - windows.ROOM - 1
    assert windows.why_refused(Path(f"{longest}r")) is None
    refused = windows.why_refused(Path(f"{longest}rr"))
    assert refused is not None and "has 180 characters; Windows allows 179 for the folder of a run" in refused
    inside = [len(str(path.relative_to(trained))) for path in trained.rglob("*")]
    assert max(inside) + len("/.1234567890.partial") < windows.ROOM


def test_a_link_on_windows_is_a_file_that_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can't be renamed over a link to a folder there."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("step_1", "step_2"):
        (tmp_path / name).mkdir()
        atomic_io.link(tmp_path / "last", name)
        assert not (tmp_path / "last").is_symlink() and atomic_io.link_target(tmp_path / "last") == tmp_path / name


def test_the_kernels_are_not_compiled_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("CXX", sys.executable)  # a compiler that is there
    reasons = fastvit_kernels.implementations()
    assert reasons["compiled"] is None and "MSVC" in str(reasons["cpp"])
    with pytest.raises(ValueError, match="'cpp' is written for GCC and Clang, .*; available here: naive, fused, sdpa"):
        fastvit_kernels.check_implementation("cpp")


@pytest.mark.parametrize(("kind", "waits"), [("mps", True), ("cuda", False)])
def test_only_page_locked_memory_is_copied_without_waiting(
    kind: str, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the batch's memory could be freed, and used again, before it has been copied."""
    copies = []

    def to(batch: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        copies.append((device.type, not non_blocking))
        return batch

    files = ImageFiles(sorted(write_folder(tmp_path).glob("test/*/*.png")))
    monkeypatch.setattr(torch.Tensor, "to", to)
    list(StreamedImages(files, rgb(32), torch.device(kind)).batches([torch.arange(4)]))
    assert copies == [(kind, waits)]


class Doubles(TorchDispatchMode):
    """Collects the operators that make a tensor of float64, which Apple's GPUs do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.calls += 1
        from_host = operator is torch.ops.aten.lift_fresh.default  # NumPy's draws, before they become float32
        dtypes = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if torch.float64 in dtypes and not from_host:
            self.found.append(str(operator))
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "nmuon"])
def test_no_step_computes_in_float64(small_config: Config, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvit_kernels.cpp.muon.is_available", lambda: False)  # it is for CPUs
    augmented = {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "trivial", "random_erasing": 0.5, "crop": "resized"}
    settings = {"optimizer": optimizer, "block": "torch", "clip_grad": 1.0, "ema": 0.9, **augmented}
    session = setup(small_config(**settings), "never", overwrite=False)
    with Doubles() as doubles:
        torch.zeros(1).double()
        train_epoch(session, ProgressBar(session.log.console, 1, 1, 1))
    assert doubles.calls > 100 and len(doubles.found) == 1, doubles.found

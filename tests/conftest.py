"""Shared by the tests: printed seeds, small data sets on disk, processes as users start them."""

import gc
import importlib.util
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything of ours is imported, or timm

from fastvit_train.config.overrides import override
from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import TrainConfig
from tests.support import null_gpu

os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # trio's, which takes a second and is of no use here
if TYPE_CHECKING:
    from tests.inference.fake_hub import FakeHub

gc.disable()  # until the tests are collected: what they import stays, and looking through it takes seconds


def _let_triton_3_6_interpret_loops() -> None:
    """Convert bounds of loops, arrays of one element, as Triton 3.8 does; int(), as before, raises in NumPy 2.5."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch_lang_tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
            elif null_gpu.is_present():
                item.add_marker(pytest.mark.xfail(raises=null_gpu.wrong_values(), reason="nothing was computed"))
        if item.get_closest_marker("nullgpu") and not null_gpu.is_present():
            item.add_marker(pytest.mark.skip(reason="needs a null CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionstart() -> None:
    if importlib.util.find_spec("triton"):
        _let_triton_3_6_interpret_loops()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[str] = Counter()
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "count":
                counts.update(value)
    if counts:
        terminalreporter.section("reliability")
        for what, number in counts.items():
            terminalreporter.line(f"{what}: {number}")


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`count(what, number=1)` adds to a line at the end of pytest's output, whichever process runs the test."""

    def add(what: str, number: int = 1) -> None:
        record_property("count", {what: number})

    return add


@pytest.fixture
def seed() -> int:
    """A fresh seed for random draws, shown when the test fails; torch is seeded with it."""
    value = int(os.environ.get("FASTVIT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FASTVIT_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: in its interpreter where there is no GPU, on the GPU where there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter and a GPU don't go together in a process")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Run torch with one thread: the models are tiny, and threads that spin cost ten times more on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # which train() and evaluate() respect; processes do not inherit it
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _any_value_on_a_null_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if null_gpu.is_present():
            null_gpu.accept_any_value(patch)
        yield


@pytest.fixture(scope="session")
def _new_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())  # mktemp looks through all folders for each


@pytest.fixture(autouse=True)
def _own_cache(_new_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = next(_new_caches)
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def small_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """The quickstart recipe, three short epochs of a tiny model, with settings replaced."""

    def config(**settings: object) -> TrainConfig:
        small = {
            "runs_dir": str(tmp_path / "runs"),
            "epochs": 3,
            "batch_size": 240,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "exp_name": "run",
            "attention": "fused",  # auto measures for seconds
        }
        return override(recipe("quickstart"), {**small, **settings}, "the test")

    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small mc-ViT trained on the digits for long enough to know most of them; to be read only."""
    settings = {"epochs": 6, "batch_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "attention": "fused"}
    runs = tmp_path_factory.mktemp("trained")
    from fastvit_train.training.loop import fit  # here, so that the process that hands out the tests starts sooner

    fit(override(recipe("quickstart"), {**settings, "runs_dir": str(runs), "exp_name": "run"}, "the test"))
    return runs / "run"


@pytest.fixture(scope="session")
def timms(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a folder as timm writes one, without a trace of the run."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timms") / "model"
    save_for_hf(timm.create_model(f"local-dir:{trained}", pretrained=True), folder, safe_serialization=True)
    return folder


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Let torch.empty return NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["FakeHub"]:
    """A fake hub that huggingface_hub uses instead of the real one, with a valid token."""
    from tests.inference.fake_hub import TOKEN, fake_hub, use_hub  # here, since few tests need huggingface_hub

    with fake_hub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub

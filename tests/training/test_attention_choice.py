"""The attention of a run: by flag, by measurement, kept on resume, in our models and in timm's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import fastvit_kernels
from fastvit_train.cli.main import main
from fastvit_train.config.schema import ModelConfig, TrainConfig
from fastvit_train.inference.evaluate import evaluate_run
from fastvit_train.models.blocks import check_block
from fastvit_train.models.vit import Block
from fastvit_train.runs.run_folder import read_jsonl
from fastvit_train.training.loop import fit
from fastvit_train.utils.errors import UserError
from tests.support import one_line_error, write_program

Config = Callable[..., TrainConfig]


def losses(tmp_path: Path, name: str = "run") -> list[float]:
    return [row["loss"] for row in read_jsonl(tmp_path / "runs" / name / "steps.jsonl")]


def recorded(tmp_path: Path) -> str:
    return yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["attention"]


def choose_always(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    samples = dict.fromkeys(("fused", "naive", "sdpa"), (2.0, 2.0, 2.0)) | {name: (1.0, 1.0, 1.0)}
    choice = fastvit_kernels.Choice("a case", samples, 0.0)
    monkeypatch.setattr(fastvit_kernels, "choose", lambda *arguments, **options: choice)


@pytest.mark.slow
def test_runs_under_each_attention_end_alike(small_config: Config, tmp_path: Path) -> None:
    ends = {}
    for name in ("naive", "fused", "sdpa", "compiled", "cpp", "auto"):
        summary = fit(small_config(attention=name, exp_name=name, epochs=2))
        assert summary["attention"] == name or name == "auto"
        assert (summary["compile_seconds"] is not None) == (summary["attention"] in ("compiled", "cpp"))
        ends[name] = [*losses(tmp_path, name), summary["test_loss"]]
    for name, values in ends.items():
        assert values == pytest.approx(ends["fused"], abs=1e-4), name


@pytest.mark.slow
def test_auto_is_the_default_and_its_pick_is_recorded_and_kept(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_always(monkeypatch, "naive")
    assert TrainConfig().model.attention == "auto"
    fit(small_config(attention="auto", block="torch", stop_after=1))
    assert recorded(tmp_path) == "naive"
    assert "attention auto: naive; ms per" in (tmp_path / "runs" / "run" / "train.log").read_text()
    choose_always(monkeypatch, "sdpa")  # what another measurement might say
    assert fit(small_config(attention="auto"), resume="must")["attention"] == "naive"
    assert recorded(tmp_path) == "naive"


@pytest.mark.parametrize("compile", [False, True])
def test_auto_measures_under_the_conditions_of_the_run(
    compile: bool, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def choose(*arguments: object, mode: str, **options: object) -> None:
        modes.append(mode)
        raise UserError("enough")

    monkeypatch.setattr(fastvit_kernels, "choose", choose)
    with pytest.raises(UserError, match="enough"):
        fit(small_config(attention="auto", block="torch", compile=compile))
    assert modes == ["compiled" if compile else "eager"]


@pytest.mark.slow
def test_a_resumed_run_takes_another_attention_if_it_is_named(small_config: Config, tmp_path: Path) -> None:
    fit(small_config(stop_after=1, attention="naive"))
    assert fit(small_config(attention="fused"), resume="must")["attention"] == "fused"


@pytest.mark.slow
def test_a_recorded_attention_that_cant_run_here_is_said_to_be_recorded(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(small_config(stop_after=1, attention="compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = r"'compiled' needs a C\+\+ compiler.*recorded in .*config.yaml; choose another with --attention"
    with pytest.raises(UserError, match=message):
        fit(small_config(attention="auto"), resume="must")
    with pytest.raises(UserError, match=message):
        evaluate_run(tmp_path / "runs" / "run")
    evaluate_run(tmp_path / "runs" / "run", attention="fused")


def test_tokens_that_the_attention_cant_serve_are_one_line(small_config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="triton supports up to 256 tokens here, got 1024; use sdpa"):
        fit(small_config(attention="triton", patch_size=1, epochs=1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_compiling_is_warmed_up_without_a_trace_in_the_run(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and random state are those of a run that had no warm-up: dropout would show it."""
    options = {"epochs": 1, "drop_rate": 0.2, "attn_drop_rate": 0.0}
    fit(small_config(attention="fused", exp_name="fused", **options))
    monkeypatch.setattr("fastvit_train.training.prepare.COMPILING", ("fused",))
    assert fit(small_config(attention="fused", exp_name="warm", **options))["compile_seconds"] > 0
    assert losses(tmp_path, "fused") == losses(tmp_path, "warm")


@pytest.mark.slow
def test_timms_vit_trains_with_ours(small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_always(monkeypatch, "naive")
    timms = {"model": "vit_tiny_patch16_224", "image_size": 32, "epochs": 1, "optimizer": "adamw"}
    used = {}
    for name in ("timm", "sdpa", "auto"):
        used[name] = fit(small_config(attention=name, exp_name=name, **timms))["attention"]
    assert used == {"timm": "timm", "sdpa": "sdpa", "auto": "naive"}
    for name in ("sdpa", "auto"):
        assert losses(tmp_path, name) == pytest.approx(losses(tmp_path, "timm"), abs=1e-3)
    results = [evaluate_run(tmp_path / "runs" / "sdpa", attention=name) for name in (None, "fused", "timm", "auto")]
    assert [r.evaluation.loss for r in results] == pytest.approx([results[0].evaluation.loss] * 4, abs=1e-5)


@pytest.mark.slow
def test_a_model_that_it_cant_serve_keeps_its_own(small_config: Config) -> None:
    resnet = {
        "model": "test_resnet",
        "embed_dim": None,
        "depth": None,
        "num_heads": None,
        "patch_size": None,
        "epochs": 1,
    }
    with pytest.raises(UserError, match="ResNet has no attention module that 'sdpa' could replace; use --attention"):
        fit(small_config(attention="sdpa", **resnet))
    assert fit(small_config(attention="auto", image_size=32, **resnet))["attention"] == "timm"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_what_cant_run_here_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit) as stop:
        main(["--attention", "triton", "--runs-dir", str(tmp_path)])
    assert stop.value.code == 2
    message = one_line_error(capsys.readouterr().err)
    assert message.startswith("attention implementation 'triton' needs a GPU; with TRITON_INTERPRET")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_on_a_cpu_blocks_are_one_kernel_unless_an_attention_is_named(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    one_kernel = Block._by_kernel
    monkeypatch.setattr(Block, "_by_kernel", lambda self, x: calls.append(x) or one_kernel(self, x))

    def run(**options: object) -> tuple[str, str]:
        fit(small_config(**{"attention": "auto", "epochs": 1, **options}), overwrite=True)
        config = yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())
        return config["block"], config["attention"]

    assert run() == ("cpp", "cpp")
    by_kernel, passes = losses(tmp_path), len(calls)
    assert passes > 0
    assert "attention cpp, block cpp" in (tmp_path / "runs" / "run" / "train.log").read_text()
    assert run(attention="fused") == ("torch", "fused")
    assert losses(tmp_path) == pytest.approx(by_kernel, abs=1e-4) and len(calls) == passes
    assert run(drop_rate=0.1, attention="cpp") == ("torch", "cpp")  # a dropout that the kernel does not have
    line = "blocks are composed from operators, which is slower: their kernel does not support dropout (drop_rate 0.1)"
    assert (tmp_path / "runs" / "run" / "train.log").read_text().count(line) == 1
    assert run(deterministic=True)[0] == "torch"


@pytest.mark.slow
def test_a_resumed_run_computes_its_blocks_as_before_unless_another_way_is_named(
    small_config: Config, tmp_path: Path
) -> None:
    whole = losses(tmp_path) if fit(small_config(attention="auto")) else []
    fit(small_config(attention="auto", stop_after=1), overwrite=True)
    fit(small_config(attention="auto"), resume="must")
    assert losses(tmp_path) == whole
    fit(small_config(attention="auto", block="torch", stop_after=1), overwrite=True)
    fit(small_config(attention="auto"), resume="must")
    assert yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["block"] == "torch"


def test_a_configuration_of_a_cpu_says_on_a_gpu_what_to_change() -> None:
    gpu, both = torch.device("cuda"), ModelConfig("mc_vit_4_4_32", "cpp", "cpp")
    with pytest.raises(UserError, match="is for CPUs, and this is cuda; give --attention fused --block torch"):
        check_block(both, gpu)
    check_block(both, torch.device("cpu"))
    check_block(ModelConfig("mc_vit_4_4_32", "auto", "auto"), gpu)


def test_a_block_that_contradicts_the_attention_or_does_not_fit_is_refused(
    small_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--block cpp computes attention itself: leave --attention sdpa out"):
        fit(small_config(attention="sdpa", block="cpp"))
    with pytest.raises(UserError, match="--block cpp does not support dropout .drop_rate 0.1.; use --block torch"):
        fit(small_config(attention="auto", block="cpp", drop_rate=0.1))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_a_working_compiler_a_run_trains_and_says_so_in_a_line(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(names: tuple[str, ...], dtype: torch.dtype, **constants: int) -> None:
        raise ValueError(f"{names[-1]} cannot be compiled (CppCompileError: no omp.h)")

    def log() -> str:
        fit(small_config(attention="auto", epochs=1), overwrite=True)
        return (tmp_path / "runs" / "run" / "train.log").read_text()

    choose_always(monkeypatch, "fused")
    monkeypatch.setattr("fastvit_kernels.cpp.block.cpp_library", fails)
    broken = log()
    assert (
        broken.count("which is slower: block_kernel/backward.cpp cannot be compiled (CppCompileError: no omp.h)") == 1
    )
    compiler = write_program(tmp_path / "compiler", "exit 3")
    monkeypatch.setenv("CXX", str(compiler))
    unusable = log()
    assert unusable.count(f"their kernel needs a C++ compiler, and {compiler} does not work (") == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = log()
    assert missing.count("which is slower: their kernel needs a C++ compiler, and no-such-compiler was not found") == 1
    assert all("attention fused" in each and "block cpp" not in each for each in (broken, unusable, missing))

"""`profile`: the phases add up, the bottleneck is named, and the trace opens."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvit_train.config.schema import TrainConfig
from fastvit_train.data.augmentation.augment import Augment
from fastvit_train.models.vit import Mlp
from fastvit_train.profiling import short_run, speedups, step_profile
from fastvit_train.profiling.speedups import Candidate, Variant
from fastvit_train.profiling.step_profile import PHASES, Profile, flops_per_image, input_share, profile_run, recommend
from fastvit_train.training.setup import setup
from fastvit_train.utils.errors import UserError
from tests.support import launch, run, write_folder

Config = Callable[..., TrainConfig]


@pytest.fixture
def only_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure one change alone, which has nothing to compile and no bf16, which many processors emulate."""
    naive = [("--attention naive", "how", Variant(attention="naive", compiled=False))]
    monkeypatch.setattr(speedups, "list_variants", lambda session: naive)


def profiled(config: TrainConfig, tmp_path: Path, steps: int = 3) -> Profile:
    return profile_run(config, steps, tmp_path / "profile")


@pytest.mark.slow
def test_the_parts_of_a_step_add_up(small_config: Config, tmp_path: Path, only_naive: None) -> None:
    result = profiled(small_config(), tmp_path)
    low, high = result.spread
    assert low <= result.step <= high
    assert low * 0.99 <= sum(result.phases.values()) <= high * 1.01
    assert all(result.phases[name] > 0 for name in PHASES)
    assert result.kernels > 100 and result.graph_breaks == result.recompilations == 0
    assert 0 < result.mfu < 1 and result.busy is None
    assert result.images_per_second == pytest.approx(240 / result.step)
    assert json.loads((tmp_path / "profile" / "profile.json").read_text())["verdict"] == result.verdict
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_trace_names_the_parts(small_config: Config, tmp_path: Path, only_naive: None) -> None:
    profiled(small_config(), tmp_path, steps=2)
    events = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in PHASES} == {**dict.fromkeys(PHASES, 2), "waiting": 3}


@pytest.mark.slow
def test_a_slow_input_is_called_so(
    small_config: Config, tmp_path: Path, only_naive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop_and_flip = Augment.crop_and_flip

    def slowly(self, *arguments):
        time.sleep(0.1)
        return crop_and_flip(self, *arguments)

    monkeypatch.setattr(Augment, "crop_and_flip", slowly)
    result = profiled(small_config(), tmp_path)
    assert 0.1 <= result.phases["input"] <= result.step
    assert result.verdict.startswith("input-bound: the input takes ") and "--crop" in result.verdict


@pytest.mark.slow
def test_a_slow_optimizer_shows_in_its_part(
    small_config: Config, tmp_path: Path, only_naive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: time.sleep(0.1))
    result = profiled(small_config(optimizer="adamw"), tmp_path)
    assert result.phases["optimizer"] == max(result.phases.values()) > 0.08


@pytest.mark.parametrize("batch_size", [1, 240])
def test_flops_are_those_of_the_definition(batch_size: int, small_config: Config) -> None:
    settings = {
        "batch_size": batch_size,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 4,
        "patch_size": 4,
        "attention": "naive",
    }
    session = setup(small_config(**settings), "never", overwrite=False)
    tokens, dim = 64, 48
    block = 2 * tokens * dim * (3 * dim + dim + 8 * dim) + 4 * tokens**2 * dim
    patches, pool_and_head = 2 * tokens * 48 * dim, 2 * tokens * dim + 2 * tokens * dim + 2 * dim * 10
    assert flops_per_image(session) == 3 * (4 * block + pool_and_head) + 2 * patches  # no gradient for the images


def test_the_verdict_goes_by_what_was_measured() -> None:
    bf16, compiled = Candidate("bf16", "so", 1.9), Candidate("--compile", "thus", 1.4)
    assert recommend(None, 0.01, False, [compiled, bf16]) == "bf16 would help: measured 1.90x (so)"
    assert recommend(0.35, 0.0, False, [compiled]).startswith(
        "launch-bound, the GPU computes 35% of the time: --compile would help: measured 1.40x"
    )
    assert recommend(0.35, 0.6, True, [compiled]).startswith(
        "input-bound: the input takes 60% of a step; without it training would be at most 2.50x as fast"
    )
    assert "--stream never" in recommend(None, 0.6, True, [compiled])
    nothing = [Candidate("x", "y", 1.04), Candidate("x", "y", 1.0, sure=False), Candidate("x", "y", 0.0, failed="why")]
    assert recommend(0.9, 0.0, False, nothing).startswith("none of the measured changes")
    larger = Candidate("--batch-size 512", "another training", 3.0, same_training=False)
    assert recommend(None, 0.0, False, [larger, compiled]).startswith("--compile")
    assert recommend(None, 0.0, False, [larger]).startswith("--batch-size 512 would help: measured 3.00x")


def test_the_verdict_agrees_with_the_list_above_it() -> None:
    """Whatever the list shows as faster, the last line names, or the list says why it does not count."""
    sdpa = Candidate("--attention sdpa", "how", 2.26, sure=False)
    bf16 = Candidate("bf16", "how", 2.24, sure=False)
    failed = Candidate("--compile", "how", 0.0, sure=False, failed="no compiler")
    assert recommend(None, 0.0, False, [sdpa, bf16, failed]).startswith(
        "uncertain: --attention sdpa 2.26x, bf16 2.24x may help, but the times varied more than they differ"
    )
    assert [str(each) for each in (sdpa, bf16)] == ["--attention sdpa 2.26x (uncertain)", "bf16 2.24x (uncertain)"]
    compiled = Candidate("--compile", "how", 1.3)
    assert recommend(None, 0.0, False, [sdpa, compiled]) == "--compile would help: measured 1.30x (how)"
    larger = Candidate("--batch-size 512", "how", 3.0, sure=False, same_training=False)
    assert str(larger) == "--batch-size 512 3.00x (uncertain, a different training)"
    for gain, shown in ((1.0451, "1.05x"), (1.0449, "1.04x")):  # what is shown decides, and not what is rounded away
        almost = Candidate("bf16", "how", gain)
        assert shown in str(almost)
        assert recommend(None, 0.0, False, [almost]).startswith("none of") == (shown == "1.04x")


def test_input_that_hides_behind_the_device_costs_nothing() -> None:
    device = {"input": 0.0, "forward": 0.5, "backward": 0.5}
    assert input_share(1.0, {"input": 0.3, "waiting": 0.6}, device) == 0
    assert input_share(1.0, {"input": 0.3, "waiting": 0.1}, device) == pytest.approx(0.2)
    assert input_share(1.0, {"input": 0.0, "waiting": 0.9}, {**device, "input": 1.0}) == pytest.approx(0.5)


@pytest.mark.slow
def test_recompilations_are_counted(
    small_config: Config, tmp_path: Path, only_naive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch = short_run.train_epoch
    config = small_config(compile=True, depth=1)
    assert profiled(config, tmp_path, steps=1).recompilations == 0

    def forgetful(*arguments) -> None:
        torch._dynamo.reset()
        train_epoch(*arguments)

    monkeypatch.setattr(short_run, "train_epoch", forgetful)
    assert profiled(config, tmp_path, steps=1).recompilations == step_profile.ROUNDS


@pytest.mark.slow
def test_graph_breaks_are_counted(
    small_config: Config, tmp_path: Path, only_naive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = Mlp.forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", broken)
    assert profiled(small_config(compile=True, depth=1), tmp_path, steps=1).graph_breaks >= 1


@pytest.mark.slow
def test_a_candidate_that_fails_is_told_and_the_rest_measured(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_step = speedups.build_step

    def out_of_memory(session, variant):
        if variant.batch_factor > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return build_step(session, variant)

    tried = [("bf16", "how", Variant(precision="bf16")), ("--batch-size 480", "how", Variant(batch_factor=2))]
    monkeypatch.setattr(speedups, "list_variants", lambda session: tried)
    monkeypatch.setattr(speedups, "build_step", out_of_memory)
    candidates = {candidate.what: candidate for candidate in profiled(small_config(), tmp_path, steps=2).candidates}
    assert candidates["bf16"].gain > 0
    assert str(candidates["--batch-size 480"]) == "--batch-size 480 failed (CUDA out of memory. Tried to allocate)"


def test_kernels_that_overlap_count_once() -> None:
    assert step_profile.union_length([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0


def test_mistakes_are_one_line(small_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --output"):
        profile_run(small_config(), 3, tmp_path / "file" / "profile")


@pytest.mark.slow
def test_the_command_measures_everything_it_can_try(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes", per_class=40)
    command = ["-m", "fastvit_train", "profile", "--dataset", "folder", "--data-dir", str(data), "--batch-size", "16"]
    done = run([sys.executable, *command, "--attention", "fused", "--steps", "3", "--depth", "1"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for what in ("bf16", "--compile", "--attention naive", "--attention sdpa", "--batch-size 32"):
        assert f"{what} " in done.stdout
    assert "USDT" not in done.stderr


@pytest.mark.slow
def test_two_processes_profile_their_own_and_one_speaks(tmp_path: Path) -> None:
    small = ("--depth", "1", "--embed-dim", "24", "--num-heads", "2", "--batch-size", "16")
    done = launch("profile", "--attention", "fused", "--steps", "2", *small, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images/s") + done.stdout.count("img/s") == 1
    assert len(list((tmp_path / "profile").glob("trace-rank*.json"))) == 2

"""`auto` checks and times the implementations, and reports its choice once."""

import functools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import registry
from fastvit_kernels.autotune import choice as choice_module
from fastvit_kernels.autotune import measurement, timers
from fastvit_kernels.fused import fused_attention
from fastvit_kernels.registry import Implementation
from tests.kernels.accuracy import assert_accurate
from tests.kernels.attention_cases import chain
from tests.kernels.autotune_cases import CASE, broken, only, replace_table, slow, wrong, wrong_in_the_backward_pass
from tests.support import null_gpu


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fused=slow, other=fused_attention)
    choice = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert choice.name == "other"
    assert choice.milliseconds["fused"] > 20 > choice.milliseconds["other"] > 0


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (wrong, "its output differs from that of fused by 1.0e-02"),
        (wrong_in_the_backward_pass, "its gradient of x differs from that of fused by"),
        (broken, "RuntimeError: no kernel image$"),
    ],
)
def test_a_failing_implementation_is_left_out_with_a_warning(
    function: Callable[..., Tensor], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, fused=slow, bad=function)
    with pytest.warns(UserWarning, match=f"attention auto leaves out bad: {why}"):
        choice = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert choice.name == "fused"
    assert set(choice.milliseconds) == {"fused"}
    assert "left out bad" in str(choice)


@pytest.mark.filterwarnings("error")
def test_an_implementation_that_does_not_support_the_shape_is_left_out_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch)
    narrow = Implementation(broken, why_unsupported=lambda x, heads: "5 is too long")
    replace_table(monkeypatch, registry.IMPLEMENTATIONS | {"narrow": narrow})
    choice = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert choice.name == "fused"
    assert str(choice).endswith("; left out narrow: 5 is too long")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("error:attention auto")
def test_ours_pass_the_check_and_large_batches_stay_within_float16(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "MAX_SECONDS", 0.1)
    choice = fastvit_kernels.choose((1024, 16, 16), 2, dtype=dtype, device="cpu")
    assert set(choice.milliseconds) == {"naive", "fused", "sdpa", "compiled", "cpp"}
    assert choice.milliseconds[choice.name] <= 1.5 * min(choice.milliseconds.values())


def test_one_line_for_each_new_shape_and_the_random_state_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    only(monkeypatch, other=slow)
    x, weight = torch.randn(2, 5, 16), torch.randn(48, 16)
    state = torch.get_rng_state()
    for tokens in (5, 5, 4):
        with torch.inference_mode():
            fastvit_kernels.attention(x[:, :tokens], weight, None, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "attention auto: fused; ms per forward and backward pass at 2x5x16, 2 heads, float32, cpu: "
    )
    assert torch.equal(state, torch.get_rng_state())


def test_a_much_slower_implementation_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def much_slower(*arguments: object) -> Tensor:
        calls.append(1)
        return slow(*arguments)

    only(monkeypatch, much_slower=much_slower)
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).name == "fused"
    assert len(calls) <= 2 + measurement.MIN_ROUNDS


def test_an_empty_batch_is_not_timed() -> None:
    assert fastvit_kernels.attention(torch.zeros(0, 5, 16), torch.zeros(48, 16), None, 2).shape == (0, 5, 16)
    with pytest.raises(ValueError, match="at least one token"):
        fastvit_kernels.attention(torch.zeros(2, 0, 16), torch.zeros(48, 16), None, 2)


@pytest.mark.slow
def test_inside_a_compiled_graph(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(48, 16)
    function = torch.compile(lambda x: fastvit_kernels.attention(x, weight, None, 2), fullgraph=True, dynamic=False)
    assert_accurate([function(x)], [chain(x, weight, None, 2)], [chain(x.double(), weight.double(), None, 2)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "float32, cpu, traced: naive " in line
    assert line.endswith("; left out compiled: it is fused inside torch.compile")


def graphed_case(
    monkeypatch: pytest.MonkeyPatch, mode: choice_module.Mode, milliseconds: dict[str, float]
) -> choice_module.Case:
    """Return a case whose passes are captured; instead of a GPU, `milliseconds` times the function of each name."""
    captured: list[str] = []

    def graph_timer(run: functools.partial[object], device: torch.device, pool: object) -> Callable[[], float]:
        name = next(name for name, entry in registry.IMPLEMENTATIONS.items() if entry.function is run.args[0])
        if name not in milliseconds:
            raise RuntimeError("operation not permitted when stream is capturing\nsee the log")
        captured.append(name)
        return lambda: milliseconds[name]

    monkeypatch.setattr(choice_module.Case, "is_graphed", True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(measurement, "graph_timer", graph_timer)
    monkeypatch.setattr(measurement, "MAX_SECONDS", 0.1)
    return choice_module.Case((2, 5, 16), 2, torch.float32, torch.float32, True, 0.0, torch.device("cpu"), None, mode)


@pytest.mark.parametrize("mode", ["compiled", "traced"])
def test_in_a_graph_the_times_on_the_device_decide(mode: choice_module.Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, fused=fused_attention, other=slow, compiled=broken)  # `other` is slow on the host alone
    compiled: list[object] = []
    monkeypatch.setattr(measurement, "compile_copy", lambda function: compiled.append(function) or function)
    choice = measurement.measure(graphed_case(monkeypatch, mode, {"fused": 0.2, "other": 0.1}))
    assert choice.name == "other"
    assert choice.milliseconds == {"fused": 0.2, "other": 0.1}
    assert choice.unsupported == {"compiled": "it is fused inside torch.compile"}
    assert f"cpu, {mode}: fused 0.200, other 0.100 (" in str(choice)
    assert compiled == ([fused_attention, slow] if mode == "compiled" else [])


def test_what_a_graph_cannot_capture_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, other=slow)
    case = graphed_case(monkeypatch, "traced", {"fused": 0.2})
    with pytest.warns(UserWarning, match="leaves out other: RuntimeError: operation not permitted when stream is"):
        choice = measurement.measure(case)
    assert choice.name == "fused"


def test_on_a_cpu_a_compiled_model_has_the_choice_of_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE, mode="compiled") is fastvit_kernels.choose(
        (2, 5, 16), 2, **CASE
    )


@pytest.mark.nullgpu
def test_replays_are_timed_without_the_host() -> None:
    x = torch.zeros(4, device="cuda")
    with null_gpu.counted() as capture:
        timer = timers.graph_timer(lambda: x + 1, x.device, torch.cuda.graph_pool_handle())
    with null_gpu.counted() as round_of_replays:
        assert timer() > 0
    assert capture.captured.total() == 1 and capture.violations == 0
    assert round_of_replays.replayed.total() == round_of_replays.calls["cudaGraphLaunch"] == 1 + timers.GPU_CALLS
    assert round_of_replays.launched.total() == round_of_replays.violations == 0
    assert round_of_replays.synchronisations == 1
    with pytest.raises(RuntimeError):
        timers.graph_timer(lambda: x.sum().item(), x.device, torch.cuda.graph_pool_handle())


@pytest.mark.nullgpu
@pytest.mark.parametrize("mode", ["eager", "compiled", "traced"])
def test_on_a_gpu_everything_that_runs_there_can_be_timed(
    mode: choice_module.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "_difference", lambda results, expected: None)  # nothing was computed
    with null_gpu.counted() as counts, torch.autocast("cuda", torch.bfloat16):
        choice = fastvit_kernels.choose((256, 64, 48), 4, dtype=torch.float32, device="cuda", dropout_p=0.1, mode=mode)
    names = {"naive", "fused", "sdpa", "compiled", "triton"}
    assert set(choice.samples) == (names if mode == "eager" else names - {"compiled"})
    assert counts.violations == 0
    assert (counts.replayed.total() == 0) == (mode == "eager")


@pytest.mark.nullgpu
def test_inside_a_graph_that_is_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_difference", lambda results, expected: None)
    x, weight = torch.zeros(2, 5, 16, device="cuda"), torch.zeros(48, 16, device="cuda")
    function = torch.compile(lambda x: fastvit_kernels.attention(x, weight, None, 2), fullgraph=True, dynamic=False)
    with null_gpu.counted() as counts:
        assert function(x).shape == x.shape
    assert counts.violations == 0 and counts.replayed.total() > 0


def test_noise_does_not_decide_between_implementations_of_equal_speed(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A busy neighbour makes half of the passes up to four times as slow: a hundred starts make the same choice."""
    table = {name: Implementation(fused_attention) for name in ("naive", "fused", "sdpa", "compiled", "cpp")}
    replace_table(monkeypatch, table)
    draw = random.Random(seed)
    factors = {"naive": 1.4, "fused": 1.05, "sdpa": 1.0, "compiled": 0.97, "cpp": 1.02}

    def time_pass(name: str) -> float:
        disturbed = draw.uniform(1, 4) if draw.random() < 0.5 else 1.0
        return 5 * factors[name] * draw.gauss(1, 0.01) * disturbed

    passes = {name: functools.partial(time_pass, name) for name in table}
    assert {fastvit_kernels.preferred(measurement._time(passes)) for _ in range(100)} == {"cpp"}
    factors["compiled"] = 0.6  # a real difference decides, in spite of the noise
    assert {fastvit_kernels.preferred(measurement._time(passes)) for _ in range(100)} == {"compiled"}


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        ({"naive": (1.0, 1.0, 1.0), "cpp": (1.05, 1.05, 1.05)}, "cpp"),
        ({"naive": (1.0, 1.0, 1.0), "cpp": (1.2, 1.2, 1.2)}, "naive"),
        ({"naive": (1.0, 1.0, 1.0), "cpp": (2.0, 2.0, 1.05)}, "cpp"),
        ({"naive": (1.0, 1.0, 1.0), "fused": (1.05, 1.05, 1.05), "cpp": (1.2, 1.2, 1.2)}, "fused"),
        ({"naive": (2.0, 2.0, 2.0)}, "naive"),
    ],
)
def test_the_preferred_one_is_replaced_only_by_one_that_is_faster_in_every_part(
    samples: dict[str, tuple[float, ...]], name: str
) -> None:
    assert fastvit_kernels.preferred(samples) == name
    assert fastvit_kernels.preferred(dict(reversed(samples.items()))) == name

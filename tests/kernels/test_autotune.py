"""`auto` checks and times the implementations, reports its choice once, and has no side effects."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import autotune, registry
from fastvit_kernels.fused import fused_attention
from fastvit_kernels.registry import Implementation
from tests.kernels.accuracy import assert_accurate
from tests.kernels.attention_cases import chain

CASE = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    autotune._choices.clear()
    yield
    autotune._choices.clear()


def slow(*arguments: object) -> Tensor:
    time.sleep(0.02)
    return fused_attention(*arguments)


def wrong(*arguments: object) -> Tensor:
    return fused_attention(*arguments) * 1.01


def wrong_in_the_backward_pass(*arguments: object) -> Tensor:
    output = fused_attention(*arguments)
    return output.detach() + 0.9 * (output - output.detach())


def broken(*arguments: object) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def only(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Tensor]) -> None:
    """Replace the implementations."""
    table = {"fused": Implementation(fused_attention)} | {name: Implementation(f) for name, f in functions.items()}
    for module in (registry, autotune):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)


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
    table = registry.IMPLEMENTATIONS | {
        "narrow": Implementation(broken, why_unsupported=lambda x, heads: "5 is too long")
    }
    for module in (registry, autotune):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", table)
    choice = fastvit_kernels.choose((2, 5, 16), 2, **CASE)
    assert choice.name == "fused"
    assert str(choice).endswith("; left out narrow: 5 is too long")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("error:attention auto")
def test_ours_pass_the_check_and_large_batches_stay_within_float16(dtype: torch.dtype, seed: int) -> None:
    choice = fastvit_kernels.choose((1024, 16, 16), 2, dtype=dtype, device="cpu")
    assert set(choice.milliseconds) == {"naive", "fused", "sdpa", "compiled", "cpp"}
    assert choice.name == min(choice.milliseconds, key=choice.milliseconds.__getitem__)


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
        "attention auto: fused is fastest; ms per forward and backward pass at 2x5x16, 2 heads, float32, cpu: "
    )
    assert torch.equal(state, torch.get_rng_state())


def test_a_much_slower_implementation_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def much_slower(*arguments: object) -> Tensor:
        calls.append(1)
        return slow(*arguments)

    only(monkeypatch, much_slower=much_slower)
    assert fastvit_kernels.choose((2, 5, 16), 2, **CASE).name == "fused"
    assert len(calls) <= 4


def test_an_empty_batch_is_not_timed() -> None:
    assert fastvit_kernels.attention(torch.zeros(0, 5, 16), torch.zeros(48, 16), None, 2).shape == (0, 5, 16)
    with pytest.raises(ValueError, match="at least one token"):
        fastvit_kernels.attention(torch.zeros(2, 0, 16), torch.zeros(48, 16), None, 2)


def test_inside_a_compiled_graph(seed: int) -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(48, 16)
    function = torch.compile(lambda x: fastvit_kernels.attention(x, weight, None, 2), fullgraph=True, dynamic=False)
    assert_accurate([function(x)], [chain(x, weight, None, 2)], [chain(x.double(), weight.double(), None, 2)])

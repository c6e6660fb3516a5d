"""`auto`: the implementation that is fastest here, for this shape and dtype, by measurement."""

import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.registry import AUTO, COMPILING, IMPLEMENTATIONS, implementations, unsuited

REFERENCE = "fused"
SECONDS = 0.5
"""that the measuring goes on for, first calls not counted, unless its fewest rounds take longer"""
MIN_ROUNDS, MAX_ROUNDS = 4, 50
HOPELESS = 3
"""times the fastest first pass"""
CHECKED_SAMPLES = 8
TF32_EPS = 2**-10
"""what float32 products on a GPU may be rounded to"""
GPU_CALLS = 10
"""calls between two synchronisations: one of some microseconds is drowned by its own synchronisation"""


@dataclass(frozen=True)
class Choice:
    """What was measured for one shape; `name` is the implementation with the lowest median."""

    name: str
    case: str
    milliseconds: dict[str, float]
    """median time of one forward and backward pass"""
    compile_seconds: float
    """first calls of what compiles itself"""
    left_out: dict[str, str] = field(default_factory=dict)
    """candidates that don't take this shape or failed the check, and why"""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.milliseconds.items())
        left_out = "".join(f"; without {name}: {why}" for name, why in self.left_out.items())
        return (
            f"attention auto: {self.name}, by ms per forward and backward at {self.case}: {times} "
            f"(compiling took {self.compile_seconds:.1f} s){left_out}"
        )


@dataclass(frozen=True)
class Case:
    """What the measuring is for."""

    shape: tuple[int, int, int]
    num_heads: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    has_bias: bool
    dropout_p: float
    device: torch.device
    autocast: torch.dtype | None

    def __str__(self) -> str:
        autocast = "" if self.autocast is None else f" under autocast to {_dtype_name(self.autocast)}"
        sizes = "x".join(map(str, self.shape))
        return f"{sizes}, {self.num_heads} heads, {_dtype_name(self.dtype)}{autocast}, {self.device.type}"


_choices: dict[Case, Choice] = {}


def choose(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_dtype: torch.dtype | None = None,
    has_bias: bool = True,
    dropout_p: float = 0.0,
) -> Choice:
    """Measure the implementations that can run here, forward and backward, on random tokens.

    Before it is timed each is checked against `fused`; one that fails is left out with a warning. Measured once in a
    process for each case, under the autocast that is on. torch's random state stays as it is.

    Args:
        shape: (batch, tokens, dim) of x.
        num_heads: heads.
        dtype, device: of x.
        weight_dtype: of the parameters; x's by default.
        has_bias: whether query, key and value have one.
        dropout_p: as in `attention`.
    """
    device = torch.device(device)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    case = Case(shape, num_heads, dtype, weight_dtype or dtype, has_bias, dropout_p, device, autocast)
    if case not in _choices:
        _choices[case] = _measure(case)
    return _choices[case]


@torch.compiler.assume_constant_result
def auto_name(
    shape: tuple[int, int, int],
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weight_dtype: torch.dtype,
    has_bias: bool,
    dropout_p: float,
) -> str:
    """The name that `choose` chose; when it had to measure, it says so on standard error. Under torch.compile it is
    called once, while tracing, and needs shapes that are not dynamic."""
    measured = len(_choices)
    choice = choose(
        shape, num_heads, dtype=dtype, device=device, weight_dtype=weight_dtype, has_bias=has_bias, dropout_p=dropout_p
    )
    if len(_choices) > measured:
        print(choice, file=sys.stderr)
    return choice.name


class Data(NamedTuple):
    """Random arguments and the gradient of the output, which is zero but for the first samples."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    upstream: Tensor

    def first(self, samples: int) -> "Data":
        """What those samples alone would be; all that is not zero in the whole batch's gradients comes from them."""
        return Data(self.x.detach()[:samples].requires_grad_(), self.weight, self.bias, self.upstream[:samples])


def _measure(case: Case) -> Choice:
    passes: dict[str, Callable[[], list[Tensor]]] = {}
    left_out: dict[str, str] = {}
    compile_seconds = 0.0
    with _apart(case):
        data = _draw(case)
        expected = _forward_backward(REFERENCE, data.first(CHECKED_SAMPLES), case.num_heads, 0.0)
        for name in _candidates(case.device):
            started = time.perf_counter()
            problem = IMPLEMENTATIONS[name].refusal(data.x, case.num_heads) or _defect(name, case, data, expected)
            compile_seconds += time.perf_counter() - started if name in COMPILING else 0.0
            if problem is None:
                passes[name] = functools.partial(_forward_backward, name, data, case.num_heads, case.dropout_p)
            else:
                left_out[name] = problem
        if not passes:
            raise RuntimeError(f"no attention can be measured at {case}: {left_out}")
        milliseconds = _medians(passes, case.device)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return Choice(fastest, str(case), milliseconds, compile_seconds, left_out)


@contextmanager
def _apart(case: Case) -> Iterator[None]:
    """Gradients on, and torch's random state put back after, whatever the caller is in the middle of.

    Autocast without its cache of cast weights: in training each step casts them anew.
    """
    gpus = [case.device] if case.device.type == "cuda" else []
    autocast = torch.autocast(case.device.type, case.autocast, enabled=case.autocast is not None, cache_enabled=False)
    with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad(), autocast:
        yield


def _candidates(device: torch.device) -> list[str]:
    """What can run here and is meant to be fast there."""
    names = [name for name, reason in implementations().items() if reason is None and name != AUTO]
    return [name for name in names if unsuited(name, device) is None]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _draw(case: Case) -> Data:
    """Tokens of variance 1, and weights that project them to about as much."""
    dim = case.shape[-1]
    of_x: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    of_weight: dict[str, Any] = {"dtype": case.weight_dtype, "device": case.device}
    x = torch.randn(case.shape, **of_x)
    weight = torch.randn(3 * dim, dim, **of_weight) * dim**-0.5
    bias = torch.randn(3 * dim, **of_weight).requires_grad_() if case.has_bias else None
    upstream = torch.zeros(case.shape, dtype=case.autocast or case.dtype, device=case.device)
    upstream[:CHECKED_SAMPLES].normal_()
    return Data(x.requires_grad_(), weight.requires_grad_(), bias, upstream)


def _forward_backward(name: str, data: Data, num_heads: int, dropout_p: float) -> list[Tensor]:
    """The output and all gradients."""
    output = IMPLEMENTATIONS[name].function(data.x, data.weight, data.bias, num_heads, dropout_p)
    inputs = [t for t in (data.x, data.weight, data.bias) if t is not None]
    return [output.detach(), *torch.autograd.grad(output, inputs, data.upstream)]


def _defect(name: str, case: Case, data: Data, expected: list[Tensor]) -> str | None:
    """Why `name` is no candidate: it raises, or differs from the reference by more than rounding; warns of it."""
    try:
        if case.dropout_p:
            _forward_backward(name, data, case.num_heads, case.dropout_p)
        results = _forward_backward(name, data, case.num_heads, 0.0)
        problem = _difference(results, expected)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if problem is not None:
        warnings.warn(f"attention auto leaves out {name}: {problem}", stacklevel=5)
    return problem


def _difference(results: list[Tensor], expected: list[Tensor]) -> str | None:
    allowed = max(torch.finfo(expected[0].dtype).eps, TF32_EPS if expected[0].is_cuda else 0.0) ** 0.5
    names = ("output", "gradient of x", "gradient of the weight", "gradient of the bias")
    for what, result, right in zip(names, results, expected, strict=False):
        off = float((result[: len(right)] - right).abs().max() / right.abs().max())
        if not off <= allowed:
            return f"its {what} differs from that of {REFERENCE} by {off:.1e} of the largest value"
    return None


def _medians(passes: dict[str, Callable[[], list[Tensor]]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each pass, in turn, so that what slows the machine for a while slows all alike.

    One whose first time is hopeless is not timed again.
    """
    times = {name: [_milliseconds(run, device)] for name, run in passes.items()}
    best = min((values[0] for values in times.values()), default=0.0)
    close = [name for name in passes if times[name][0] <= HOPELESS * best]
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for name in close:
            times[name].append(_milliseconds(passes[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    calls = 1 if device.type == "cpu" else GPU_CALLS
    _synchronize(device)
    before = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - before) / calls * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

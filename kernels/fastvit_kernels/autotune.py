"""The `auto` implementation: measure which one is fastest on this machine for a shape and dtype."""

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

from fastvit_kernels.registry import AUTO, COMPILING, IMPLEMENTATIONS, implementations, why_unsupported

REFERENCE = "fused"
MAX_SECONDS = 0.5
"""timing stops after this time, not counting first calls, but not before `MIN_ROUNDS` rounds"""
MIN_ROUNDS, MAX_ROUNDS = 4, 50
MAX_SLOWDOWN = 3
"""an implementation whose first pass takes longer than this multiple of the fastest is not timed again"""
CHECKED_SAMPLES = 8
"""samples of the batch whose results are compared with the reference"""
TF32_EPS = 2**-10
"""relative precision of TF32, in which a GPU may multiply float32 matrices"""
GPU_CALLS = 10
"""calls between two synchronisations; a synchronisation takes longer than a call of a few microseconds"""


@dataclass(frozen=True)
class Choice:
    """The measurements for one shape; `name` is the implementation with the lowest median time."""

    name: str
    case: str
    """shape, heads, dtype and device, for messages"""
    milliseconds: dict[str, float]
    """median time of one forward and backward pass, by implementation"""
    compile_seconds: float
    """time of the first calls of implementations that compile kernels"""
    left_out: dict[str, str] = field(default_factory=dict)
    """implementations that do not support this shape or failed the check, each with the reason"""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.milliseconds.items())
        left_out = "".join(f"; left out {name}: {why}" for name, why in self.left_out.items())
        return (
            f"attention auto: {self.name} is fastest; ms per forward and backward pass at {self.case}: {times} "
            f"(compilation took {self.compile_seconds:.1f} s){left_out}"
        )


@dataclass(frozen=True)
class Case:
    """The properties of a call that its speed depends on."""

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
    """Time the forward and backward pass of each implementation that can run here, on random tokens.

    Each implementation is first compared with `fused`; if it fails, it is left out with a warning. The result is cached
    per process for each combination of the arguments and of the enabled autocast dtype. torch's random state does not
    change.

    Args:
        shape: (batch, tokens, dim) of x.
        num_heads: number of heads; must divide dim.
        dtype: dtype of x.
        device: device of x.
        weight_dtype: dtype of the parameters; by default that of x.
        has_bias: whether the projections of query, key and value have a bias.
        dropout_p: dropout probability, as in `attention`.

    Raises:
        RuntimeError: if no implementation supports the shape.
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
    """Return the name that `choose` selects, and print the result of a new measurement to standard error.

    Under torch.compile this runs once, during tracing, and needs static shapes.
    """
    measured_before = len(_choices)
    choice = choose(
        shape, num_heads, dtype=dtype, device=device, weight_dtype=weight_dtype, has_bias=has_bias, dropout_p=dropout_p
    )
    if len(_choices) > measured_before:
        print(choice, file=sys.stderr)
    return choice.name


class Data(NamedTuple):
    """Random arguments, and an output gradient that is zero except for the first `CHECKED_SAMPLES` samples."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_output: Tensor

    def first(self, samples: int) -> "Data":
        """Return the data of the first samples only.

        The other samples have a zero output gradient, so the gradients of the parameters are those of the whole batch.
        """
        return Data(self.x.detach()[:samples].requires_grad_(), self.weight, self.bias, self.grad_output[:samples])


def _measure(case: Case) -> Choice:
    passes: dict[str, Callable[[], list[Tensor]]] = {}
    left_out: dict[str, str] = {}
    compile_seconds = 0.0
    with _isolated(case):
        data = _random_data(case)
        expected = _forward_backward(REFERENCE, data.first(CHECKED_SAMPLES), case.num_heads, 0.0)
        for name in _candidates(case.device):
            started = time.perf_counter()
            problem = IMPLEMENTATIONS[name].why_unsupported(data.x, case.num_heads) or _check(
                name, case, data, expected
            )
            compile_seconds += time.perf_counter() - started if name in COMPILING else 0.0
            if problem is None:
                passes[name] = functools.partial(_forward_backward, name, data, case.num_heads, case.dropout_p)
            else:
                left_out[name] = problem
        if not passes:
            raise RuntimeError(f"no attention implementation supports {case}: {left_out}")
        milliseconds = _medians(passes, case.device)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return Choice(fastest, str(case), milliseconds, compile_seconds, left_out)


@contextmanager
def _isolated(case: Case) -> Iterator[None]:
    """Enable gradients, and restore torch's random state afterwards.

    Autocast does not cache the cast weights here, because each training step casts them again.
    """
    gpus = [case.device] if case.device.type == "cuda" else []
    autocast = torch.autocast(case.device.type, case.autocast, enabled=case.autocast is not None, cache_enabled=False)
    with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad(), autocast:
        yield


def _candidates(device: torch.device) -> list[str]:
    """Names of the implementations that can run here and are meant for `device`."""
    names = [name for name, reason in implementations().items() if reason is None and name != AUTO]
    return [name for name in names if why_unsupported(name, device) is None]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random_data(case: Case) -> Data:
    """Draw tokens of variance 1, and weights that keep the variance near 1."""
    dim = case.shape[-1]
    x_options: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    weight_options: dict[str, Any] = {"dtype": case.weight_dtype, "device": case.device}
    x = torch.randn(case.shape, **x_options)
    weight = torch.randn(3 * dim, dim, **weight_options) * dim**-0.5
    bias = torch.randn(3 * dim, **weight_options).requires_grad_() if case.has_bias else None
    grad_output = torch.zeros(case.shape, dtype=case.autocast or case.dtype, device=case.device)
    grad_output[:CHECKED_SAMPLES].normal_()
    return Data(x.requires_grad_(), weight.requires_grad_(), bias, grad_output)


def _forward_backward(name: str, data: Data, num_heads: int, dropout_p: float) -> list[Tensor]:
    """Return the output and the gradients of x, weight and bias."""
    output = IMPLEMENTATIONS[name].function(data.x, data.weight, data.bias, num_heads, dropout_p)
    inputs = [t for t in (data.x, data.weight, data.bias) if t is not None]
    return [output.detach(), *torch.autograd.grad(output, inputs, data.grad_output)]


def _check(name: str, case: Case, data: Data, expected: list[Tensor]) -> str | None:
    """Warn and return why `name` is left out: it raises, or differs from the reference by more than rounding."""
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
    for name, result, right in zip(names, results, expected, strict=False):
        difference = float((result[: len(right)] - right).abs().max() / right.abs().max())
        if not difference <= allowed:  # so that NaN fails
            return f"its {name} differs from that of {REFERENCE} by {difference:.1e} of the largest value"
    return None


def _medians(passes: dict[str, Callable[[], list[Tensor]]], device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each pass, timed in interleaved rounds so that other load affects all alike."""
    times = {name: [_milliseconds(run, device)] for name, run in passes.items()}
    best = min((values[0] for values in times.values()), default=0.0)
    close = [name for name in passes if times[name][0] <= MAX_SLOWDOWN * best]
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > MAX_SECONDS:
            break
        for name in close:
            times[name].append(_milliseconds(passes[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


# fastvit_train.utils.timing has this too; but the kernels work alone, and the import order forbids it here.
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

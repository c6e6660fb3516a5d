"""`auto`: the implementation that is fastest here, for this shape and dtype, by measurement."""

import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvit_kernels.registry import AUTO, IMPLEMENTATIONS, implementations, triton_interpreted

REFERENCE = "fused"
SECONDS = 0.5
"""that the measuring takes, first calls not counted"""
MIN_ROUNDS, MAX_ROUNDS = 5, 50
COMPILE = ("compiled", "triton")
"""whose first call compiles"""
GPU_CALLS = 10
"""calls between two synchronisations: one of some microseconds is drowned by its own synchronisation"""

Arguments = tuple[Tensor, Tensor, Tensor | None, int, float]


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
    device: torch.device,
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


def _measure(case: Case) -> Choice:
    passes: dict[str, Callable[[], list[Tensor]]] = {}
    left_out: dict[str, str] = {}
    compile_seconds = 0.0
    with _apart(case.device):
        tensors = _draw(case)
        expected = _forward_backward(REFERENCE, (*tensors, case.num_heads, 0.0))
        for name in _candidates():
            problem = IMPLEMENTATIONS[name].refusal(tensors[0], case.num_heads)
            if problem is None:
                started = time.perf_counter()
                problem = _defect(name, (*tensors, case.num_heads, 0.0), expected)
                compile_seconds += time.perf_counter() - started if name in COMPILE else 0.0
                if problem is not None:
                    warnings.warn(f"attention auto leaves out {name}: {problem}", stacklevel=4)
            if problem is None:
                passes[name] = functools.partial(_forward_backward, name, (*tensors, case.num_heads, case.dropout_p))
            else:
                left_out[name] = problem
        milliseconds = _medians(passes, case.device)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return Choice(fastest, str(case), milliseconds, compile_seconds, left_out)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Gradients on and torch's random state put back after, whatever the caller is in the middle of."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices, device_type=kind), torch.inference_mode(False), torch.enable_grad():
        yield


def _candidates() -> list[str]:
    """What can run here; Triton's interpreter can, but isn't meant for speed."""
    names = [name for name, reason in implementations().items() if reason is None and name != AUTO]
    return [name for name in names if not (name == "triton" and triton_interpreted())]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _draw(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens of variance 1, and weights that project them to about as much."""
    dim = case.shape[-1]
    x = torch.randn(case.shape, dtype=case.dtype, device=case.device).requires_grad_()
    weight = torch.randn(3 * dim, dim, dtype=case.weight_dtype, device=case.device).mul_(dim**-0.5).requires_grad_()
    bias = torch.randn(3 * dim, dtype=case.weight_dtype, device=case.device).requires_grad_()
    return x, weight, bias if case.has_bias else None


def _forward_backward(name: str, arguments: Arguments) -> list[Tensor]:
    """The output and the gradients of half its sum of squares, which depends on all of them."""
    output = IMPLEMENTATIONS[name].function(*arguments)
    inputs = [t for t in arguments[:3] if t is not None]
    return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]


def _defect(name: str, arguments: Arguments, expected: list[Tensor]) -> str | None:
    """Why `name` is no candidate: it raises, or differs from the reference by more than rounding."""
    try:
        results = _forward_backward(name, arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    tf32 = arguments[0].is_cuda and torch.get_float32_matmul_precision() != "highest"
    eps = max(torch.finfo(expected[0].dtype).eps, 2**-10 if tf32 else 0.0)
    names = ("output", "gradient of x", "gradient of the weight", "gradient of the bias")
    for what, result, right in zip(names, results, expected, strict=False):
        off = float((result - right).abs().max() / right.abs().max())
        if not off <= eps**0.5:
            return f"its {what} differs from that of {REFERENCE} by {off:.1e} of the largest value"
    return None


def _medians(passes: dict[str, Callable[[], list[Tensor]]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each pass, in turn, so that what slows the machine for a while slows all alike."""
    calls = 1 if device.type == "cpu" else GPU_CALLS
    times: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > SECONDS:
            break
        for name, run in passes.items():
            _synchronize(device)
            before = time.perf_counter()
            for _ in range(calls):
                run()
            _synchronize(device)
            times[name].append((time.perf_counter() - before) / calls * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""Check and time the implementations for one case, in interleaved rounds."""

import contextvars
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.autotune.choice import PARTS, Case, Choice
from fastvit_kernels.autotune.timers import Timer, graph_timer, host_timer
from fastvit_kernels.compiled import compile_copy
from fastvit_kernels.registry import COMPILING, IMPLEMENTATIONS, candidates
from fastvit_kernels.torch_private import is_observed

REFERENCE = "fused"
MAX_SECONDS = 1.0
"""timing stops after this time, not counting first calls, but not before `MIN_ROUNDS` rounds"""
MIN_ROUNDS, MAX_ROUNDS = 6, 48
MAX_SLOWDOWN = 5
"""an implementation is not timed again if its first `MIN_ROUNDS` all took longer than this multiple of the fastest"""
CHECKED_SAMPLES = 8
"""samples of the batch whose results are compared with the reference"""
TF32_EPS = 2**-10
"""relative precision of TF32, in which a GPU may multiply float32 matrices"""


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


def measure(case: Case) -> Choice:
    """Compare each implementation that can run here with the reference, and time those that pass.

    Where a context of the caller would record, count, trace or forbid the passes (checkpointing, `FlopCounterMode`,
    `torch.export`, `torch.func`), a thread of its own measures, in which that context is not active. An implementation
    that fails is left out with a warning.

    Raises:
        RuntimeError: if no implementation supports the case.
    """
    if is_observed():
        with ThreadPoolExecutor(1) as thread:
            choice = thread.submit(contextvars.copy_context().run, _measure, case, _gpu(case)).result()
    else:
        choice = _measure(case, _gpu(case))
    for name, problem in choice.failed.items():
        warnings.warn(f"attention auto leaves out {name}: {problem}", stacklevel=4)
    return choice


def _gpu(case: Case) -> int:
    """Return the index of the case's GPU, by default that of the calling thread's current one; -1 for a CPU."""
    if case.device.type != "cuda":
        return -1
    return torch.cuda.current_device() if case.device.index is None else case.device.index


def _measure(case: Case, gpu: int) -> Choice:
    timers: dict[str, Timer] = {}
    unsupported: dict[str, str] = {}
    failed: dict[str, str] = {}
    compile_seconds = 0.0
    with _surroundings(case, gpu):
        data = _random_data(case)
        expected = _forward_backward(IMPLEMENTATIONS[REFERENCE].function, data.first(CHECKED_SAMPLES), case.num_heads)
        pool = torch.cuda.graph_pool_handle() if case.is_graphed else None
        for name in candidates(case.device):
            started = time.perf_counter()
            if (reason := _why_unsupported(name, case, data.x)) is not None:
                unsupported[name] = reason
            elif isinstance(prepared := _prepare(name, case, data, expected, pool), str):
                failed[name] = prepared
            else:
                timers[name] = prepared
            if name in COMPILING or case.mode == "compiled":
                compile_seconds += time.perf_counter() - started
        if not timers:
            raise RuntimeError(f"no attention implementation supports {case}: {unsupported | failed}")
        samples = _time(timers)
    return Choice(str(case), samples, compile_seconds, unsupported, failed)


@contextmanager
def _surroundings(case: Case, gpu: int) -> Iterator[None]:
    """Enable gradients, the GPU and the case's autocast, also in a new thread; restore the random state afterwards.

    Autocast does not cache the cast weights here, because each training step casts them again.
    """
    autocast = torch.autocast(case.device.type, case.autocast, enabled=case.autocast is not None, cache_enabled=False)
    random_state = torch.random.fork_rng([gpu] if gpu >= 0 else [])
    with torch.cuda.device(gpu), random_state, torch.inference_mode(False), torch.enable_grad(), autocast:
        yield


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


def _forward_backward(
    function: Callable[..., Tensor], data: Data, num_heads: int, dropout_p: float = 0.0
) -> list[Tensor]:
    """Return the output and the gradients of x, weight and bias."""
    output = function(data.x, data.weight, data.bias, num_heads, dropout_p)
    inputs = [t for t in (data.x, data.weight, data.bias) if t is not None]
    return [output.detach(), *torch.autograd.grad(output, inputs, data.grad_output)]


def _why_unsupported(name: str, case: Case, x: Tensor) -> str | None:
    if name == "compiled" and case.mode != "eager":
        return "it is fused inside torch.compile"
    return IMPLEMENTATIONS[name].why_unsupported(x, case.num_heads)


def _prepare(name: str, case: Case, data: Data, expected: list[Tensor], pool: Any | None) -> Timer | str:
    """Return the timer of `name`, or why it is left out.

    That is if it raises, if it differs from the reference by more than rounding, or if a graph cannot capture it.
    """
    function = IMPLEMENTATIONS[name].function
    try:
        if case.dropout_p:
            _forward_backward(function, data, case.num_heads, case.dropout_p)
        problem = _difference(_forward_backward(function, data, case.num_heads), expected)
        if problem is None:
            return _timer(function, case, data, pool)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return problem


def _timer(function: Callable[..., Tensor], case: Case, data: Data, pool: Any | None) -> Timer:
    """Return a timer of forward and backward passes as they will run in `case`."""
    if case.mode == "compiled":
        function = compile_copy(function)
    run = functools.partial(_forward_backward, function, data, case.num_heads, case.dropout_p)
    return host_timer(run, case.device) if pool is None else graph_timer(run, case.device, pool)


def _difference(results: list[Tensor], expected: list[Tensor]) -> str | None:
    allowed = max(torch.finfo(expected[0].dtype).eps, TF32_EPS if expected[0].is_cuda else 0.0) ** 0.5
    names = ("output", "gradient of x", "gradient of the weight", "gradient of the bias")
    for name, result, right in zip(names, results, expected, strict=False):
        difference = float((result[: len(right)] - right).abs().max() / right.abs().max())
        if not difference <= allowed:  # so that NaN fails
            return f"its {name} differs from that of {REFERENCE} by {difference:.1e} of the largest value"
    return None


def _time(timers: Mapping[str, Timer]) -> dict[str, tuple[float, ...]]:
    """Return the milliseconds of the fastest round of each part of the rounds, for each timer.

    The rounds are interleaved, and each part takes rounds from all of the time, so that other load affects all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > MAX_SECONDS:
            break
        limit = MAX_SLOWDOWN * min((min(values) for values in times.values() if values), default=0.0)
        for name, values in times.items():
            if turn < MIN_ROUNDS or min(values) <= limit:
                values.append(timers[name]())
    return {name: tuple(min(values[part::PARTS]) for part in range(PARTS)) for name, values in times.items()}

"""LayerNorm, MLP and residual connection in Triton kernels; without a GPU they run in Triton's interpreter."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvit_kernels
from fastvit_kernels.triton_kernels import mlp as triton_mlp
from tests.kernels.accuracy import assert_accurate

SHAPES = [(2, 9, 48, 192), (1, 67, 24, 40), (3, 5, 64, 96), (1, 1, 16, 20)]
"""(batch, tokens, dim, hidden): odd numbers of tokens, and widths that fill their tiles or do not"""
GELUS = ["tanh", "none"]
SMALL = (2, 9, 24, 40)
residual_mlp = functools.partial(fastvit_kernels.residual_mlp, implementation="triton")


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Draw x, not centered, and the parameters: of norm, fc1 and fc2, each weight and bias."""
    batch, tokens, dim, hidden = shape
    tensors = [
        torch.randn(batch, tokens, dim) * 2 + 0.5,
        1 + torch.randn(dim) / 3, torch.randn(dim) / 3,
        torch.randn(hidden, dim) * dim**-0.5, torch.randn(hidden) / 3,
        torch.randn(dim, hidden) * hidden**-0.5, torch.randn(dim) / 3,
    ]  # fmt: skip
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def modules(x: Tensor, *parameters: Tensor, gelu: str = "tanh") -> Tensor:
    """The same function by torch's modules."""
    dim, hidden = x.shape[-1], len(parameters[2])
    layers = [nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(gelu), nn.Linear(hidden, dim)]
    branch = nn.Sequential(*layers).to(x.device, parameters[0].dtype)
    names = [name for name, _ in branch.named_parameters()]
    return x + torch.func.functional_call(branch, dict(zip(names, parameters, strict=True)), (x,))


def passes(function: Callable[..., Tensor], arguments: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all arguments."""
    out = function(*arguments)
    return [out.detach(), *torch.autograd.grad(out, arguments, upstream.to(out.dtype))]


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def accuracy_cases() -> Iterator[Any]:
    """All combinations. Quick are all of one shape, and each shape in float32 with tanh; the others are slow."""
    for shape, dtype, gelu in itertools.product(SHAPES, [torch.float32, torch.float16, torch.bfloat16], GELUS):
        quick = shape == SHAPES[2] or (dtype, gelu) == (torch.float32, "tanh")
        yield pytest.param(shape, dtype, gelu, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("shape", "dtype", "gelu"), list(accuracy_cases()), ids=str)
def test_output_and_gradients_are_as_accurate_as_those_of_torchs_operators(
    shape: tuple[int, int, int, int], dtype: torch.dtype, gelu: str, triton_device: str, nan_memory: None, seed: int
) -> None:
    arguments = draw(shape, dtype, triton_device)
    upstream = torch.randn(shape[:3], device=triton_device).to(dtype)
    exact = passes(functools.partial(modules, gelu=gelu), cast(arguments, torch.float64), upstream)
    baseline = passes(functools.partial(modules, gelu=gelu), arguments, upstream)
    results = passes(functools.partial(residual_mlp, gelu=gelu), arguments, upstream)
    assert [result.dtype for result in results] == [dtype] * 8
    for each in zip(results, baseline, exact, strict=True):
        assert_accurate(*([tensor] for tensor in each))


def test_the_torch_implementation_is_the_modules(seed: int) -> None:
    arguments = draw(SMALL, torch.float32, "cpu")
    for gelu in GELUS:
        found = fastvit_kernels.residual_mlp(*arguments, gelu=gelu)
        torch.testing.assert_close(found, modules(*arguments, gelu=gelu), rtol=1e-6, atol=1e-6)


def test_autocast_keeps_the_dtype_of_the_residual_stream_and_of_the_parameters(triton_device: str, seed: int) -> None:
    arguments = draw(SMALL, torch.float32, triton_device)
    upstream = torch.randn(SMALL[:3], device=triton_device)
    exact = passes(modules, cast(arguments, torch.float64), upstream)
    with torch.autocast(triton_device, torch.bfloat16):
        results, baseline = passes(residual_mlp, arguments, upstream), passes(modules, arguments, upstream)
    assert [result.dtype for result in results] == [torch.float32] * 8
    for each in zip(results, baseline, exact, strict=True):
        assert_accurate(*([tensor] for tensor in each))
    single = residual_mlp(*(tensor.detach() for tensor in arguments))
    assert not torch.equal(single, results[0])  # so the products were rounded to bfloat16


def test_the_gradients_agree_with_finite_differences(triton_device: str, seed: int) -> None:
    arguments = draw((1, 3, 16, 16), torch.float32, triton_device)
    upstream = torch.randn(1, 3, 16, device=triton_device)
    _, *gradients = passes(residual_mlp, arguments, upstream)
    for argument, gradient in zip(arguments, gradients, strict=True):
        step = torch.randn_like(argument) * 1e-2

        def moved(sign: int, argument: Tensor = argument, step: Tensor = step) -> float:
            changed = [each + sign * step if each is argument else each for each in arguments]
            return float((residual_mlp(*changed).detach().double() * upstream).sum())

        expected = (moved(1) - moved(-1)) / 2
        scale = float(gradient.norm() * step.norm())
        assert abs(float((gradient.double() * step).sum()) - expected) <= 5e-3 * scale


@pytest.mark.slow
def test_the_result_is_the_same_each_time_and_every_program_counts(triton_device: str, seed: int) -> None:
    arguments = draw((5, 33, 24, 40), torch.float32, triton_device)  # more blocks of tokens than programs
    upstream = torch.randn(5, 33, 24, device=triton_device)
    first, second = (passes(residual_mlp, arguments, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    baseline, exact = passes(modules, arguments, upstream), passes(modules, cast(arguments, torch.float64), upstream)
    assert_accurate(first, baseline, exact)


def test_strided_tokens(triton_device: str, seed: int) -> None:
    x, *parameters = (tensor.detach() for tensor in draw(SMALL, torch.float32, triton_device))
    expected = residual_mlp(x, *parameters).transpose(0, 1)
    torch.testing.assert_close(residual_mlp(x.transpose(0, 1), *parameters), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_graph_compiles_through_it(triton_device: str, seed: int) -> None:
    arguments = draw(SMALL, torch.float32, triton_device)
    upstream = torch.randn(SMALL[:3], device=triton_device)
    compiled = torch.compile(residual_mlp, fullgraph=True, backend="aot_eager")
    results, expected = (passes(function, arguments, upstream) for function in (compiled, residual_mlp))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(backward: bool, triton_device: str, seed: int) -> None:
    arguments = draw(SMALL, torch.float32, triton_device)
    if backward:
        tensors = [arguments[0].detach(), *(tensor.detach() for tensor in arguments[:-1])]
        torch.library.opcheck(triton_mlp.residual_mlp_backward, (*tensors, 1e-5, "none", torch.float32))
    else:
        torch.library.opcheck(triton_mlp.residual_mlp, (*arguments, 1e-5, "tanh", torch.float32))


def test_the_flops_are_those_of_the_definition(triton_device: str, seed: int) -> None:
    counts = []
    for function in (residual_mlp, modules):
        with FlopCounterMode(display=False) as counter:
            function(*draw(SMALL, torch.float32, triton_device)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(2, 65)}, "norm_weight must be"),
        ({0: torch.zeros(2, 24, dtype=torch.float64)}, "norm_weight is torch.float32, x is torch.float64"),
        ({3: torch.zeros(40, 23)}, r"fc1_weight must be \(40, 24\), got \(40, 23\)"),
        ({6: torch.zeros(40)}, r"fc2_bias must be \(24,\), got \(40,\)"),
    ],
)
def test_arguments_that_do_not_match_are_refused(changed: dict[int, Tensor], message: str) -> None:
    arguments = [changed.get(i, tensor) for i, tensor in enumerate(draw(SMALL, torch.float32, "cpu"))]
    with pytest.raises(ValueError, match=message):
        fastvit_kernels.residual_mlp(*arguments)


def test_what_the_kernels_do_not_support_is_refused(triton_device: str) -> None:
    with pytest.raises(ValueError, match="up to 64 channels, got 72; use torch"):
        residual_mlp(*draw((1, 2, 72, 16), torch.float32, triton_device))
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got torch.float64; use torch"):
        residual_mlp(*draw(SMALL, torch.float64, triton_device))
    with pytest.raises(ValueError, match="gelu must be tanh or none, got 'relu'"):
        residual_mlp(*draw(SMALL, torch.float32, triton_device), gelu="relu")
    with pytest.raises(ValueError, match="unknown MLP implementation 'tritn'; allowed: torch, triton"):
        residual_mlp(*draw(SMALL, torch.float32, triton_device), implementation="tritn")


def test_large_hidden_values(triton_device: str) -> None:
    x, *parameters = (tensor.detach() for tensor in draw(SMALL, torch.float32, triton_device))
    parameters[3].fill_(1e4)  # fc1's bias: GELU of it is the bias itself
    expected = x + F.linear(torch.full((40,), 1e4, device=x.device), *parameters[4:])
    torch.testing.assert_close(residual_mlp(x, *parameters), expected, rtol=1e-3, atol=10)

"""All implementations compute the same function, forward and backward."""

import copy
import functools
import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_kernels import registry
from tests.kernels.accuracy import assert_accurate, logits_and_gradients
from tests.kernels.attention_cases import DTYPES, SHAPES, cast, chain, draw, passes, sdpa_chain

NAMES = [name for name in fastvit_kernels.implementations() if name != fastvit_kernels.AUTO]
QUICKLY = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("triton", "compiled"))) for name in NAMES]
"""all implementations; what is interpreted or compiled is slow"""
DRAWS = 4
"""number of draws whose errors are summed, because the errors of two draws can differ by a factor of two"""
QUICK = {
    "compiled": ((5, 7, 24, 3), []),
    "cpp": ((5, 7, 24, 3), [torch.float32, torch.bfloat16]),
    "triton": ((3, 5, 16, 2), [torch.float32]),
}


def names_on(device: str) -> list[str]:
    """The implementations that a device can run: cpp is for CPUs only."""
    return [name for name in NAMES if name != "cpp" or device == "cpu"]


def why_unsupported(name: str, x: Tensor, heads: int) -> str | None:
    """Why the GPU at hand does not support these tokens; a CPU supports all shapes of these tests."""
    if not x.is_cuda:
        return None
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        return "GPUs before Ampere have no bfloat16"
    return registry.IMPLEMENTATIONS[name].why_unsupported(x, heads)


def on_each_device(cases: list[Any]) -> list[Any]:
    """Each case, a pytest.param whose first value is an implementation, on the CPU and, if possible, on a GPU."""
    return [
        pytest.param(*case.values, device, marks=[*case.marks, *marks])
        for device, marks in (("cpu", []), ("cuda", [pytest.mark.gpu]))
        for case in cases
        if case.values[0] in names_on(device)
    ]


def operator(name: str, heads: int, device: str = "cpu", **options: float) -> functools.partial[Tensor]:
    if name == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter and a GPU cannot be used in the same process")
    return functools.partial(fastvit_kernels.attention, num_heads=heads, implementation=name, **options)


def slow_if(slow: bool) -> Any:
    return pytest.mark.slow if slow else ()


def accuracy_cases() -> list[object]:
    """All combinations; those that compile for seconds, are interpreted or emulated, are slow except for a few.

    What torch.compile makes of `fused` is compiled for each shape in one dtype, and in the others only by -m soak.
    """
    cases = []
    for name, shape, dtype in itertools.product(NAMES, SHAPES, DTYPES):
        quick_shape, quick_dtypes = QUICK.get(name, (shape, DTYPES))
        emulated = dtype != torch.float32 and shape[2] >= 192  # by many CPUs
        slow = shape != quick_shape or dtype not in quick_dtypes or emulated
        soak = name == "compiled" and DTYPES.index(dtype) != SHAPES.index(shape) % len(DTYPES)
        cases.append(pytest.param(name, shape, dtype, marks=pytest.mark.soak if soak else slow_if(slow)))
    return cases


@pytest.mark.parametrize(("name", "shape", "dtype", "device"), on_each_device(accuracy_cases()), ids=str)
def test_error_is_at_most_twice_that_of_torchs_own_chain(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> None:
    heads = shape[-1]
    if reason := why_unsupported(name, torch.empty(shape[:3], dtype=dtype, device=device), heads):
        pytest.skip(reason)
    # The baseline for sdpa is torch's scaled_dot_product_attention.
    torchs = functools.partial(sdpa_chain if name == "sdpa" else chain, heads=heads)
    squares = []
    for _ in range(DRAWS):
        arguments = draw(shape, True, dtype, device)
        upstream = torch.randn(shape[:3], device=device).to(dtype)
        exact = passes(functools.partial(chain, heads=heads), cast(arguments, torch.float64), upstream)
        both = passes(operator(name, heads, device), arguments, upstream), passes(torchs, arguments, upstream)
        squares.append(
            [[float((got - right).square().sum()) for got, right in zip(g, exact, strict=True)] for g in both]
        )
    ours, allowed = torch.tensor(squares, dtype=torch.float64).sum(0)
    for what, error, limit in zip(("output", "x", "weight", "bias"), ours.sqrt(), 2 * allowed.sqrt(), strict=True):
        assert error <= limit, f"{what}: root of the summed squares {error:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize(("name", "device"), on_each_device(QUICKLY))
def test_without_bias_and_with_tensors_that_are_not_contiguous(name: str, device: str, seed: int) -> None:
    _, weight, bias = draw((1, 1, 24, 3), True, torch.float32, device)
    inputs = [
        (torch.randn(7, 4, 24, device=device).transpose(0, 1), weight, bias),
        (torch.randn(1, 7, 24, device=device).expand(4, -1, -1), weight, None),
        (torch.randn(4, 7, 30, device=device)[..., 3:27], weight, None),
        (torch.randn(4, 24, 7, device=device).transpose(1, 2), weight.detach().t().contiguous().t(), bias),
    ]
    upstreams = (torch.ones(1, device=device).expand(4, 7, 24), torch.randn(7, 4, 24, device=device).transpose(0, 1))
    for x, w, b in inputs:
        arguments = (x.requires_grad_(), w.detach().requires_grad_(), b)
        for upstream in upstreams:
            results = passes(operator(name, 3, device), arguments, upstream)
            baseline = passes(functools.partial(chain, heads=3), arguments, upstream)
            exact = passes(functools.partial(chain, heads=3), cast(arguments, torch.float64), upstream)
            for result, other, right in zip(results, baseline, exact, strict=True):
                assert_accurate([result.float()], [other.float()], [right])


@pytest.mark.parametrize("name", ["naive", "fused", "sdpa", pytest.param("compiled", marks=pytest.mark.slow)])
def test_gradcheck(name: str, seed: int) -> None:
    arguments = draw((2, 3, 4, 2), True, torch.float64)
    assert torch.autograd.gradcheck(operator(name, 2), arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device"), on_each_device([pytest.param(name) for name in NAMES]))
@pytest.mark.parametrize("shape", [(3, 7, 24, 3), (2, 5, 96, 4)], ids=str)
def test_every_element_is_written(name: str, shape: tuple[int, int, int, int], device: str, seed: int) -> None:
    arguments = draw(shape, True, torch.float32, device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty return NaN
    try:
        assert torch.empty(1, device=device).isnan()
        results = passes(operator(name, shape[-1], device), arguments, torch.randn(shape[:3]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(("name", "device"), on_each_device(QUICKLY))
def test_dropout_zeroes_weights_and_keeps_the_mean(name: str, device: str, seed: int) -> None:
    x, weight, bias = (t.detach() for t in draw((1, 16, 16, 2), True, torch.float32, device))
    many = x.expand(100 if name == "triton" else 4000, -1, -1)
    outputs = operator(name, 2, device, dropout_p=0.3)(many, weight, bias)
    off = outputs.mean(0) - chain(x, weight, bias, 2)[0]
    assert (off.abs() < 6 * outputs.std(0) / len(many) ** 0.5).all()
    # Of one head's outputs for a token some may hardly vary, but not four.
    assert outputs.std(0).unflatten(-1, (4, 4)).amax(-1).min() > 0.01


@pytest.mark.parametrize(
    ("name", "shape", "device"),
    on_each_device(
        [
            *(pytest.param(name, (4, 9, 24, 3), marks=slow_if(name in ("compiled", "triton"))) for name in NAMES),
            pytest.param("triton", (2, 9, 96, 4), marks=pytest.mark.slow),
        ]
    ),
    ids=str,
)
def test_dropout_is_the_same_in_the_backward_pass(
    name: str, shape: tuple[int, int, int, int], device: str, seed: int
) -> None:
    """The gradient is the slope of the function that the forward pass computed with the same dropout mask.

    The slope is a central difference. Its truncation error grows with the square of the step: it is about a third of
    the change that a doubled step makes. Its rounding error is that of the summed products, over the step.
    """
    arguments = draw(shape, True, torch.float32, device)
    function = operator(name, shape[-1], device, dropout_p=0.4)
    upstream, directions = torch.randn(shape[:3], device=device), [torch.randn_like(t) for t in arguments]

    def value(step: float) -> float:
        torch.manual_seed(7)
        moved = (t.detach() + step * d for t, d in zip(arguments, directions, strict=True))
        return float((function(*moved).double() * upstream).sum())

    torch.manual_seed(7)
    output = function(*arguments)
    gradients = torch.autograd.grad(output, arguments, upstream)
    slope = sum(float((g.double() * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 1e-3
    single, double = ((value(h) - value(-h)) / (2 * h) for h in (step, 2 * step))
    rounding = 4 * torch.finfo(torch.float32).eps * float((output.detach() * upstream).norm()) / step
    assert abs(single - slope) <= abs(double - single) + rounding


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["mc_vit_4_4_32", "c_vit_4_4_32", "cct_2_3x2_32"])
def test_one_checkpoint_gives_the_same_logits_and_gradients_under_each(
    model_name: str, triton_device: str, seed: int
) -> None:
    model = timm.create_model(model_name, attention="naive", initializer_range=0.2, depth=2).eval().to(triton_device)
    images = torch.randn(4, 3, 32, 32, device=triton_device)

    def compute(model: torch.nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return logits_and_gradients(model, images, lambda logits: logits.logsumexp(1).sum())

    baseline, exact = compute(model, images), compute(copy.deepcopy(model).double(), images.double())
    for name in names_on(triton_device)[1:]:
        if why_unsupported(name, model.pos_embed, model.blocks[0].attn.num_heads):
            continue
        fastvit_kernels.swap_attention(model, name)
        for each in zip(compute(model, images), baseline, exact, strict=True):
            assert_accurate(*each)


def test_attention_weights_are_the_probabilities(seed: int) -> None:
    x, weight, bias = (t.detach() for t in draw((2, 7, 24, 3), True, torch.float64))
    weights = fastvit_kernels.attention_weights(x, weight, bias, 3)
    assert weights.shape == (2, 3, 7, 7)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    value = (x @ weight[48:].T + bias[48:]).view(2, 7, 3, 8).transpose(1, 2)
    assert torch.allclose((weights @ value).transpose(1, 2).flatten(2), chain(x, weight, bias, 3))
    with pytest.raises(ValueError, match="got 5 heads for dim 24"):
        fastvit_kernels.attention_weights(x, weight, bias, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"implementation": "flash"},
            "unknown attention implementation 'flash'; allowed: naive, fused, sdpa, compiled",
        ),
        ({"x": torch.zeros(4, 8)}, r"x must be \(batch, tokens, dim\)"),
        ({"x": torch.zeros(1, 4, 8, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
        ({"qkv_weight": torch.zeros(8, 8)}, r"qkv_weight must be \(3\*dim, dim\)"),
        ({"qkv_bias": torch.zeros(8)}, r"qkv_bias must be \(3\*dim,\)"),
        ({"num_heads": 3}, "got 3 heads for dim 8"),
        ({"num_heads": 0}, "got 0 heads for dim 8"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"x": torch.zeros(1, 4, 8, dtype=torch.float64)}, "qkv_weight is torch.float32, x is torch.float64"),
        ({"x": torch.zeros(1, 4, 8, device="meta")}, "qkv_weight is on cpu, x on meta"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(1, 4, 8), "qkv_weight": torch.zeros(24, 8), "qkv_bias": None, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        fastvit_kernels.attention(**{**arguments, **change})

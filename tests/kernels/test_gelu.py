"""The GELU kernel for CPUs equals torch's tanh-approximated GELU, and GELULinear equals the two layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels import GELULinear
from fastvit_kernels.cpp import gelu as cpp_gelu
from fastvit_kernels.cpp.gelu import gelu, gelu_backward
from tests.kernels.accuracy import assert_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (31,), (3, 7, 19), (64, 5, 192)], ids=str)
def test_error_is_at_most_twice_that_of_torchs_own(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    exact_x = x.detach().double().requires_grad_()
    exact, torchs = (F.gelu(argument, approximate="tanh") for argument in (exact_x, x))
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, upstream.double())
    (torchs_gradient,) = torch.autograd.grad(torchs, x, upstream)
    gradient, again = gelu_backward(upstream, x.detach())
    rounding = 2 * torch.finfo(torch.float32).eps  # it computes in fp32; of one result, torch's own error may be 0
    for ours in (gelu(x.detach()), again):
        assert (ours - exact).norm() <= 2 * (torchs - exact).norm() + rounding * x.norm()
    error, torchs_error = (gradient - exact_gradient).norm(), (torchs_gradient - exact_gradient).norm()
    assert error <= 2 * torchs_error + rounding * upstream.norm()


def both_layers(layer: GELULinear, x: Tensor) -> Tensor:
    return F.linear(F.gelu(x, approximate=layer.approximate), layer.weight, layer.bias)


def gradients(layer: GELULinear, x: Tensor, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


def exact_results(layer: GELULinear, x: Tensor) -> list[Tensor]:
    """Output and gradients of the two plain layers in float64."""
    layer, x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    out = both_layers(layer, x)
    return [out.detach(), *gradients(layer, x, out)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_layer_is_the_two_layers(bias: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    layer = GELULinear(10, 6, "tanh")
    if not bias:
        layer.bias = None
    x = torch.randn(3, 5, 20)[..., ::2].requires_grad_()
    wanted = both_layers(layer, x)
    baseline = [wanted.detach(), *gradients(layer, x, wanted)]
    exact = exact_results(layer, x)
    monkeypatch.setattr(F, "gelu", lambda *args, **kwargs: pytest.fail("torch's GELU was called"))
    out = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    for each in zip([out.detach(), *gradients(layer, x, out)], baseline, exact, strict=True):
        assert_accurate(*([tensor] for tensor in each))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program_has_only_torchs_operators(strict: bool, seed: int) -> None:
    layer, x = GELULinear(20, 6, "tanh"), torch.randn(3, 20)
    program = torch.export.export(layer.eval(), (x,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.gelu.default" in called and not [name for name in called if not name.startswith("aten.")]
    with torch.no_grad():
        exact = both_layers(copy.deepcopy(layer).double(), x.double())
        assert_accurate([program.module()(x)], [layer(x)], [exact])


def test_under_autocast_it_computes_in_bfloat16_and_saves_only_its_argument(seed: int) -> None:
    layer, x = GELULinear(192, 48, "tanh"), torch.randn(64, 192, requires_grad=True)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert [tuple(tensor.shape) for tensor in kept].count((64, 192)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        wanted = both_layers(layer, x)
    results, baseline = ([y.detach(), *gradients(layer, x, y.float())] for y in (out, wanted))
    assert [result.dtype for result in results] == [tensor.dtype for tensor in baseline]
    for each in zip(results, baseline, exact_results(layer, x), strict=True):
        assert_accurate(*([tensor] for tensor in each))


def test_extremes() -> None:
    x = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30, float("inf"), float("nan")])
    y = gelu(x)
    assert y[:2].abs().max() < 1e-6 and y[2] == 0 and torch.equal(y[3:6], x[3:6]) and y[6].isnan()


def test_without_a_compiler_and_in_other_dtypes_it_uses_torch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    layer = GELULinear(5, 3, "tanh").double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 5, dtype=torch.float64, requires_grad=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    x = torch.randn(2, 5)
    assert torch.equal(layer.float()(x), both_layers(layer, x))


def test_dropout_is_between_the_two_layers_and_only_in_training(seed: int) -> None:
    layer, x = GELULinear(1000, 1000, "tanh", drop=0.25), torch.randn(4, 1000)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    dropped = layer(x)
    whole = layer.eval()(x)
    assert torch.equal(whole, both_layers(layer, x))
    kept = dropped != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_if_the_compiler_fails_it_warns_once_and_uses_torch(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def fails(names: tuple[str, ...], dtype: torch.dtype, **constants: int) -> None:
        raise ValueError(f"{names[-1]} cannot be compiled (CppCompileError: no omp.h)")

    monkeypatch.setattr(cpp_gelu, "cpp_library", fails)
    cpp_gelu._compile_error.cache_clear()
    layer, x = GELULinear(5, 3, "tanh"), torch.randn(2, 5)
    try:
        with pytest.warns(UserWarning, match="GELU uses torch's operators, which are slower: .*no omp.h") as warned:
            results = [layer(x) for _ in range(2)]
        assert len(warned) == 1 and all(torch.equal(y, both_layers(layer, x)) for y in results)
    finally:
        cpp_gelu._compile_error.cache_clear()

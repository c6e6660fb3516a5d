"""The GELU kernel for CPUs computes torch's tanh-approximated GELU, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fastvit_kernels import TanhGELU, cpp_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (31,), (3, 7, 19), (64, 5, 192)], ids=str)
def test_error_is_at_most_twice_that_of_torchs_own(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = (4 * torch.randn(shape)).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    exact_x = x.detach().double().requires_grad_()
    exact = F.gelu(exact_x, approximate="tanh")
    ours, torchs = TanhGELU()(x), F.gelu(x, approximate="tanh")
    rounding = 2 * torch.finfo(torch.float32).eps  # it computes in fp32; of one result, torch's own error may be 0
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm() + rounding * x.norm()
    (gradient,), (torchs_gradient,) = (torch.autograd.grad(y, x, upstream) for y in (ours, torchs))
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, upstream.double())
    error, torchs_error = (gradient - exact_gradient).norm(), (torchs_gradient - exact_gradient).norm()
    assert error <= 2 * torchs_error + rounding * upstream.norm()


def test_the_kernel_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "gelu", lambda *args, **kwargs: pytest.fail("torch's GELU was called"))
    TanhGELU()(torch.ones(3))


def test_extremes() -> None:
    x = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30, float("inf"), float("nan")])
    y = TanhGELU()(x)
    assert y[:2].abs().max() < 1e-6 and y[2] == 0 and torch.equal(y[3:6], x[3:6]) and y[6].isnan()


def test_without_a_compiler_and_in_other_dtypes_it_is_torchs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TanhGELU(), x)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert torch.equal(TanhGELU()(x.float()), F.gelu(x.float(), approximate="tanh"))


def test_a_compiler_that_fails_is_told_once_and_done_without(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def fails(name: str, dtype: torch.dtype) -> None:
        raise ValueError(f"{name} can't be compiled (CppCompileError: no omp.h)")

    monkeypatch.setattr(cpp_gelu, "cpp_library", fails)
    cpp_gelu._problem.cache_clear()
    x = torch.randn(5)
    try:
        with pytest.warns(UserWarning, match="GELU is torch's own here, slower: .*no omp.h") as told:
            results = [TanhGELU()(x) for _ in range(2)]
        assert len(told) == 1 and all(torch.equal(y, F.gelu(x, approximate="tanh")) for y in results)
    finally:
        cpp_gelu._problem.cache_clear()


def test_strided_tensors_and_compiled_graphs(seed: int) -> None:
    x = torch.randn(6, 10)[:, ::2].requires_grad_()
    module = torch.compile(TanhGELU(), fullgraph=True)
    for function in (TanhGELU(), module):
        y = function(x)
        assert torch.allclose(y, F.gelu(x, approximate="tanh"), atol=1e-6)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (right,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
        assert torch.allclose(gradient, right, atol=1e-5)

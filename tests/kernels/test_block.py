"""A transformer block in one CPU kernel each way: the same function, gradients and random draws as its operators."""

import itertools
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastvit_kernels
from fastvit_kernels import BlockParameters, BlockSettings, transformer_block
from fastvit_kernels.cpp import block as cpp
from fastvit_train.models.vit import Block, Mlp
from tests.kernels.accuracy import assert_accurate
from tests.support import ROOT, run, write_program

# (batch, tokens, dim, heads, hidden): odd batches and numbers of tokens, one token, tiles of two and of three vectors
SMALL = (3, 9, 48, 4, 192)
SHAPES = [
    (3, 64, 48, 4, 192), (5, 65, 48, 4, 192), (7, 17, 48, 4, 192), (1, 1, 48, 4, 192), (2, 50, 96, 6, 192),
    (3, 33, 96, 4, 144), (5, 64, 128, 2, 128), (1, 197, 192, 3, 768), (1, 256, 256, 4, 512), (3, 64, 384, 6, 1536),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]
Shape = tuple[int, int, int, int, int]


def draw(shape: Shape, bias: bool = True) -> tuple[Tensor, BlockParameters]:
    """Draw tokens that are not centered, and parameters that keep their variance."""
    batch, tokens, dim, _, hidden = shape

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return torch.randn(outputs, inputs) * inputs**-0.5, torch.randn(outputs) / 3

    norms = [(1 + torch.randn(dim) / 3, torch.randn(dim) / 3) for _ in range(2)]
    qkv_weight, qkv_bias = linear(3 * dim, dim)
    parameters = BlockParameters(
        *norms[0], qkv_weight, qkv_bias if bias else None, *linear(dim, dim),
        *norms[1], *linear(hidden, dim), *linear(dim, hidden),
    )  # fmt: skip
    return torch.randn(batch, tokens, dim) * 2 + 0.5, parameters


def passes(
    name: str,
    x: Tensor,
    parameters: BlockParameters,
    settings: BlockSettings,
    scales: tuple[Tensor, Tensor] | None,
    upstream: Tensor,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> list[Tensor]:
    """Return the output and the gradients of x and all parameters, in float64."""
    arguments = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = transformer_block(arguments[0], BlockParameters(*arguments[1:]), settings, scales, implementation=name)
    gradients = torch.autograd.grad(out, [t for t in arguments if t is not None], upstream.to(out.dtype))
    return [t.detach().double() for t in (out, *gradients)]


@contextmanager
def set_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy_cases() -> Iterator[Any]:
    options = itertools.product(["tanh", "none"], [False, True], [False, True], [False, True])
    for dtype, (gelu, residual_norm, bias, scaled) in itertools.product(DTYPES, options):
        quick = (dtype, gelu, residual_norm, bias, scaled) == (torch.float32, "tanh", False, True, False)  # our models
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(SMALL, dtype, gelu, residual_norm, bias, scaled, marks=marks)
    for shape, dtype, compact in itertools.product(SHAPES, DTYPES, [False, True]):
        gelu = "none" if compact else "tanh"
        # Half of them, beginning with mc-ViT in bf16: each family with each shape, and with each dtype.
        often = (SHAPES.index(shape) + DTYPES.index(dtype) + compact) % 2 == 1
        marks = pytest.mark.slow if often else pytest.mark.soak
        yield pytest.param(shape, dtype, gelu, compact, not compact, compact, marks=marks)


@pytest.mark.parametrize(("shape", "dtype", "gelu", "residual_norm", "bias", "scaled"), list(accuracy_cases()), ids=str)
def test_error_is_at_most_twice_that_of_torchs_operators(
    shape: Shape, dtype: torch.dtype, gelu: str, residual_norm: bool, bias: bool, scaled: bool,
    nan_memory: None, seed: int,
) -> None:  # fmt: skip
    squares = []
    settings = BlockSettings(shape[3], 1e-5, 1e-6, gelu, residual_norm)
    for threads in (1, 2, 3):
        x, parameters = draw(shape, bias)
        scales = (torch.rand(shape[0]) * 2, (torch.rand(shape[0]) * 2).round()) if scaled else None
        upstream = torch.randn(x.shape)
        exact_scales = None if scales is None else (scales[0].double(), scales[1].double())
        exact = passes("torch", x, parameters, settings, exact_scales, upstream, torch.float64)
        for_both = (x, parameters, settings, scales, upstream)
        chain = passes("torch", *for_both, autocast=dtype == torch.bfloat16)
        with set_threads(threads):
            ours = passes("cpp", *for_both, autocast=dtype == torch.bfloat16)
        squares.append(
            [[float((a - b).square().sum()) for a, b in zip(results, exact, strict=True)] for results in (ours, chain)]
        )
    ours_sum, chain_sum = torch.tensor(squares, dtype=torch.float64).sum(0)
    names = ["output", "x", *(n for n, p in parameters._asdict().items() if p is not None)]
    floor = 2e-7 * torch.tensor([float(t.norm()) for t in exact])  # of exact sums, such as a last bias's
    for what, error, limit in zip(names, ours_sum.sqrt(), 2 * chain_sum.sqrt() + floor, strict=True):
        assert error <= limit, f"{what}: root of the summed squares {error:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_number_of_threads_gives_the_same_bits_again(dtype: torch.dtype, threads: int, seed: int) -> None:
    x, parameters = draw((9, 21, 48, 4, 192))
    arguments = (x, parameters, BlockSettings(4), None, torch.randn(x.shape))
    with set_threads(threads):
        first, *others = (passes("cpp", *arguments, autocast=dtype == torch.bfloat16) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def module(attn_drop: float = 0.0, drop_path: float = 0.0, residual_norm: bool = False) -> Block:
    attn = fastvit_kernels.SelfAttention(nn.Linear(48, 144), nn.Linear(48, 48), 4, attn_drop, implementation="cpp")
    return Block(48, attn, Mlp(48, 192, "tanh", 0.0, 0.0), drop_path, residual_norm)


def outputs(block: Block, name: str, x: Tensor, seed: int) -> list[Tensor]:
    block.implementation = name
    torch.manual_seed(seed)
    out = block(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(block.parameters()))]


def assert_alike(results: list[Tensor], others: list[Tensor]) -> None:
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=2e-4, atol=2e-4 * float(other.abs().max()))


@pytest.mark.parametrize(("attn_drop", "drop_path"), [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_dropout_and_stochastic_depth_draw_what_the_operators_draw(
    attn_drop: float, drop_path: float, seed: int
) -> None:
    block, x = module(attn_drop, drop_path), torch.randn(6, 19, 48)
    dropped = outputs(block, "cpp", x, seed)
    assert_alike(dropped, outputs(block, "torch", x, seed))
    assert not torch.allclose(dropped[0], outputs(block, "cpp", x, seed + 1)[0])
    block.eval()
    assert torch.equal(outputs(block, "cpp", x, 1)[0], outputs(block, "cpp", x, 2)[0])


def test_a_dropped_branch_adds_exactly_nothing(seed: int) -> None:
    x, parameters = draw(SMALL)
    zero, one = torch.zeros(3), torch.ones(3)
    assert torch.equal(transformer_block(x, parameters, BlockSettings(4), (zero, zero), implementation="cpp"), x)
    assert not torch.allclose(transformer_block(x, parameters, BlockSettings(4), (one, zero), implementation="cpp"), x)


def test_compiled_as_a_whole_and_recomputed_it_is_the_same(seed: int) -> None:
    block, x = module(), torch.randn(4, 9, 48)
    expected = outputs(block, "cpp", x, seed)
    out = checkpoint(block, x, use_reentrant=False)
    recomputed = [out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))]
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))
    block.compile(fullgraph=True, backend="aot_eager")
    assert_alike(outputs(block, "cpp", x, seed), expected)


def test_it_saves_less_for_the_backward_pass_and_nothing_without_gradients(seed: int) -> None:
    block, x = module(), torch.randn(8, 64, 48)
    sizes = {}
    for name in ("torch", "cpp"):
        block.implementation, saved = name, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            block(x)
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        sizes[name] = sum(kept.values())
    assert sizes["cpp"] < 0.6 * sizes["torch"]
    with torch.no_grad():
        out = fastvit_kernels.transformer_block(
            x, block._parameters_of_kernel(), BlockSettings(4), implementation="cpp"
        )
    assert not out.requires_grad


def test_its_operations_are_counted_like_those_of_its_operators(seed: int) -> None:
    block, x = module(), torch.randn(2, 9, 48, requires_grad=True)
    counts = []
    for name in ("torch", "cpp"):
        block.implementation = name
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_what_the_kernel_does_not_support_is_composed_from_operators_or_refused(seed: int) -> None:
    block, x = module().double(), torch.randn(2, 9, 48, dtype=torch.float64)
    block.attn.implementation = "fused"
    assert torch.equal(outputs(block, "cpp", x, 1)[0], outputs(block, "torch", x, 1)[0])
    x, parameters = draw((2, 9, 40, 4, 160))
    with pytest.raises(ValueError, match="does not support embed_dim 40 .*multiples of 16.*; use torch"):
        transformer_block(x, parameters, BlockSettings(4), implementation="cpp")
    with pytest.raises(ValueError, match="unknown block implementation 'cuda'; allowed: torch, cpp"):
        transformer_block(x, parameters, BlockSettings(4), implementation="cuda")


@pytest.mark.slow
def test_in_bfloat16_throughout_it_is_as_accurate_as_the_operators(seed: int) -> None:
    x, parameters = draw(SMALL)
    upstream = torch.randn(x.shape)
    names = ("cpp", "torch")
    ours, chain = (passes(n, x, parameters, BlockSettings(4), None, upstream, torch.bfloat16) for n in names)
    rounded = [t if t is None else t.bfloat16().double() for t in (x, *parameters)]
    exact = passes(
        "torch", rounded[0], BlockParameters(*rounded[1:]), BlockSettings(4), None, upstream.bfloat16(), torch.float64
    )
    for each in zip(ours, chain, exact, strict=True):
        assert_accurate(*([t] for t in each))


def test_scales_may_lie_anywhere_in_memory(seed: int) -> None:
    x, parameters = draw(SMALL)
    columns = torch.rand(3, 2)
    results = [
        transformer_block(x, parameters, BlockSettings(4), scales, implementation="cpp")
        for scales in ((columns[:, 0], columns[:, 1]), (columns[:, 0].clone(), columns[:, 1].clone()))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("implementation", ["torch", "cpp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": BlockSettings(7)}, "num_heads must divide dim: got 7 heads for dim 48"),
        ({"settings": BlockSettings(0)}, "num_heads must divide dim"),
        ({"settings": BlockSettings(4, gelu="erf")}, "gelu must be tanh or none, got 'erf'"),
        ({"settings": BlockSettings(4, dropout_p=1.0)}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"x": torch.zeros(2, 0, 48)}, "at least one token"),
        ({"x": torch.zeros(2, 48)}, r"x must be \(batch, tokens, dim\)"),
        ({"x": torch.zeros(3, 9, 48, dtype=torch.float64)}, "qkv_weight is torch.float32, x is torch.float64"),
        ({"fc1_bias": torch.zeros(191)}, r"fc1_bias must be \(192,\), got \(191,\)"),
        ({"fc2_weight": torch.zeros(48, 191)}, r"fc2_weight must be \(48, 192\), got \(48, 191\)"),
        ({"norm1_weight": torch.zeros(1)}, r"norm1_weight must be \(48,\), got \(1,\)"),
        ({"proj_bias": torch.zeros(48, dtype=torch.float64)}, "proj_bias is torch.float64, x is torch.float32"),
        ({"scales": (torch.ones(1), torch.ones(3))}, r"scales must be \(batch,\) = \(3,\), got \(1,\)"),
    ],
)
def test_arguments_that_do_not_match_are_refused(implementation: str, change: dict[str, Any], message: str) -> None:
    x, parameters = draw(SMALL)
    arguments: dict[str, Any] = {"x": x, "settings": BlockSettings(4), **change}
    own = {name: arguments.pop(name) for name in list(arguments) if name in parameters._fields}
    with pytest.raises(ValueError, match=message):
        transformer_block(parameters=parameters._replace(**own), **arguments, implementation=implementation)


def test_the_gradient_of_scales_is_the_operators_alone() -> None:
    x, parameters = draw(SMALL)
    scales = (torch.ones(3, requires_grad=True), torch.ones(3))
    with pytest.raises(ValueError, match="cpp does not support scales that require a gradient; use torch"):
        transformer_block(x, parameters, BlockSettings(4), scales, implementation="cpp")
    transformer_block(x, parameters, BlockSettings(4), scales).sum().backward()
    assert scales[0].grad is not None and scales[0].grad.abs().sum() > 0


@pytest.mark.slow
def test_opcheck(seed: int) -> None:
    """With dropout and stochastic depth."""
    x, parameters = draw(SMALL)
    tensors = [x, *parameters, torch.rand(3), torch.rand(3), torch.tensor([5])]
    settings = [4, False, False, [1e-5, 1e-6, 0.2], torch.float32]
    inputs = [t.clone().requires_grad_() for t in tensors[:13]]
    torch.library.opcheck(cpp.block, (*inputs, *tensors[13:], *settings, True))
    saved = cpp.block(*tensors, *settings, True)[1:]
    backward = (torch.randn(SMALL[:3]), list(saved), tensors[0], tensors[1:13], tensors[13:15], tensors[15], *settings)
    torch.library.opcheck(cpp.block_backward, backward)


@pytest.mark.slow
def test_in_bfloat16_attention_weights_are_dropped_as_in_float32(seed: int) -> None:
    x, parameters = draw(SMALL)
    settings = BlockSettings(4, dropout_p=0.4)

    def compute(autocast: bool, number: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return transformer_block(x, parameters, settings, seed=torch.tensor([number]), implementation="cpp")

    exact, rounded, other = compute(False, 1), compute(True, 1), compute(False, 2)
    assert (rounded - exact).norm() < 0.02 * exact.norm() < 0.2 * (other - exact).norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86-64")
@pytest.mark.parametrize(
    ("architecture", "capability", "registers"),
    [
        pytest.param("x86-64-v3", "avx2", {"xmm", "ymm"}, marks=pytest.mark.slow),  # eight lanes
        pytest.param("x86-64", "default", {"xmm"}, marks=pytest.mark.soak),  # four lanes
    ],
)
def test_built_for_an_older_processor_it_is_as_accurate(
    architecture: str, capability: str, registers: set[str], tmp_path: Path
) -> None:
    script = f'exec {os.environ.get("CXX", "g++")} "$@" -march={architecture}'
    compiler, cache = write_program(tmp_path / "compiler", script), tmp_path / "cache"
    node = f"{__file__}::{test_error_is_at_most_twice_that_of_torchs_operators.__name__}"
    cases = [f"{node}[{SMALL}-{dtype}-none-True-False-True]" for dtype in DTYPES]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not soak", *cases]
    older = {"CXX": str(compiler), "ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = run(command, ROOT, **older)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:]
    libraries = [str(path) for path in cache.rglob("*.so") if b"backward" in path.read_bytes()]  # not torch's own
    code = run(["objdump", "-d", "--no-show-raw-insn", *libraries]).stdout
    assert set(re.findall(r"%([xyz]mm)\d", code)) == registers

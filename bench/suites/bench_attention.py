"""Self-attention over one batch: the operator's implementations, and whole modules, ours, torch's and timm's."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import cast

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import fastvit_kernels
from bench.benchmark_case import CALLS, DTYPES, BenchmarkCase, Workload, assert_close, device
from fastvit_kernels.cuda_graph import record_graph
from fastvit_train.profiling.roofline import count_flops

SHAPES = {
    "cpu": [(256, 64, 48, 4), (64, 256, 256, 4)],
    "cuda": [(256, 64, 48, 4), (4096, 64, 48, 4), (1024, 256, 256, 4)],
}
OPERATOR, MODULE = "attention operator", "attention module"
FORWARD, BOTH = PASSES = "forward", "forward+backward"
TORCH, TIMM = "torch MultiheadAttention", "timm Attention"


def why_unavailable(implementation: str) -> str | None:
    """Why an implementation is not timed on this device, or None if it is."""
    return (
        fastvit_kernels.why_unsupported(implementation, device()) or fastvit_kernels.implementations()[implementation]
    )


class Operator(nn.Module):
    """The operator with the weights of `module`, without its output projection."""

    def __init__(self, module: fastvit_kernels.SelfAttention) -> None:
        super().__init__()
        self.qkv, self.num_heads, self.implementation = module.qkv, module.num_heads, module.implementation

    def forward(self, x_BND: Tensor) -> Tensor:
        weight, bias = self.qkv.weight, self.qkv.bias
        return fastvit_kernels.attention(x_BND, weight, bias, self.num_heads, implementation=self.implementation)


class TorchAttention(nn.Module):
    """torch.nn.MultiheadAttention with the weights of `module`."""

    def __init__(self, module: fastvit_kernels.SelfAttention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(module.proj.in_features, module.num_heads, batch_first=True)
        state = {"in_proj_weight": module.qkv.weight, "in_proj_bias": module.qkv.bias}
        state |= {"out_proj.weight": module.proj.weight, "out_proj.bias": module.proj.bias}
        self.attention.to(module.proj.weight).load_state_dict(state)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.attention(x_BND, x_BND, x_BND, need_weights=False)[0]


def timm_attention(module: fastvit_kernels.SelfAttention) -> nn.Module:
    """timm's Attention with the weights of `module`."""
    timm_module = timm.layers.Attention(module.proj.in_features, module.num_heads, qkv_bias=True)
    timm_module.qkv, timm_module.proj = module.qkv, module.proj
    return timm_module


ROWS: dict[str, dict[str, Callable[[fastvit_kernels.SelfAttention], nn.Module]]] = {
    OPERATOR: dict.fromkeys(fastvit_kernels.implementations(), Operator),
    MODULE: {
        **dict.fromkeys(fastvit_kernels.implementations(), lambda module: module),
        TORCH: TorchAttention,
        TIMM: timm_attention,
    },
}
"""for each level and row, a function that makes the row's module from one that owns the weights"""


def self_attention(dim: int, heads: int, implementation: str) -> fastvit_kernels.SelfAttention:
    """Return a module with the same weights each time, in float32 on the CPU."""
    draws = torch.Generator().manual_seed(0)
    module = fastvit_kernels.SelfAttention(
        nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads, implementation=implementation
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5, generator=draws)
    return module


def make(
    level: str, passes: str, row: str, shape: tuple[int, int, int], dtype: torch.dtype, batch: int
) -> tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]:
    """Return a row's module and the pass to time; all rows have the same tokens and weights."""
    tokens, dim, heads = shape
    implementation = row if row in fastvit_kernels.implementations() else "fused"
    module = ROWS[level][row](self_attention(dim, heads, implementation).to(device(), dtype))
    x, grad_output = torch.randn(2, batch, tokens, dim, generator=torch.Generator().manual_seed(1))
    inputs = x.to(device(), dtype, copy=True).requires_grad_()
    if passes == FORWARD:
        return module, partial(forward, module.eval(), inputs)  # torch's module has a fast path for evaluation
    return module, partial(forward_and_backward, module, inputs, grad_output.to(device(), dtype))


@lru_cache(maxsize=1)  # the rows of a group are consecutive
def reference(level: str, passes: str, shape: tuple[int, int, int], batch: int) -> tuple[Tensor, ...]:
    """Compute the expected results in float64."""
    _, run = make(level, passes, "naive", shape, torch.float64, batch)
    return run()


def build(
    level: str, passes: str, name: str, shape: tuple[int, int, int], dtype: str, graph: bool, batch: int
) -> Workload:
    module, run = make(level, passes, name, shape, DTYPES[dtype], batch)
    if graph:
        run = replayed(run)

    def check() -> None:
        for result, expected in zip(run(), reference(level, passes, shape, batch), strict=True):
            assert_close(result, expected, dtype, f"{name}'s {passes}")

    flops = batch * count_flops(make(level, passes, "fused", shape, torch.float32, 1)[1])
    saves = tuple(module.parameters()) if passes == BOTH else None
    return Workload(run, check, batch, flops, saves, calls=CALLS[device().type])


def forward(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output."""
    with torch.no_grad():
        return (module(x),)


def forward_and_backward(module: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of x and of the weights, ordered by size."""
    leaves: list[Tensor] = [x, *sorted(module.parameters(), key=Tensor.numel)]
    output = module(x)
    output.backward(grad_output)
    gradients = [cast(Tensor, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return output.detach(), *gradients


def replayed(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Record `run` into a CUDA graph; replaying it takes the time of the GPU without that of the host."""
    results: tuple[Tensor, ...] = ()

    def keep_results() -> None:
        nonlocal results
        results = run()

    graph = record_graph(keep_results)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def cases() -> Iterator[BenchmarkCase]:
    graphs = (False, True) if device().type == "cuda" else (False,)
    for level, passes, (batch, *shape), dtype in product(ROWS, PASSES, SHAPES[device().type], DTYPES):
        tokens, dim, heads = shape
        for name, graph in product(ROWS[level], graphs):
            yield BenchmarkCase(
                f"{level} {passes}",
                f"B{batch} N{tokens} D{dim} H{heads}",
                dtype,
                f"{name}, CUDA graph" if graph else name,
                batch,
                partial(build, level, passes, name, (tokens, dim, heads), dtype, graph),
                None if name in (TORCH, TIMM) else why_unavailable(name),
                main=(level, passes, batch) == (MODULE, BOTH, SHAPES[device().type][0][0]) and not graph,
                quick_check=name == "fused" and dtype == "fp32" and dim == 48 and passes == BOTH,
            )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_attention(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

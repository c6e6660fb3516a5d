"""Self-attention over one batch: the operator's implementations, and the whole module beside torch's and timm's."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import cast

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import fastvit_kernels
from bench.case import CALLS, DTYPES, Case, Work, assert_close, device
from fastvit_train.profiling.roofline import count_flops

SHAPES = {
    "cpu": [(256, 64, 48, 4), (64, 256, 256, 4)],
    "cuda": [(256, 64, 48, 4), (4096, 64, 48, 4), (1024, 256, 256, 4)],
}
OPERATOR, MODULE = "attention operator", "attention module"
FORWARD, BOTH = PASSES = "forward", "forward+backward"
TORCH, TIMM = "torch MultiheadAttention", "timm Attention"


def unavailable(implementation: str) -> str | None:
    """Why an implementation isn't timed here."""
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


class Torchs(nn.Module):
    """torch.nn.MultiheadAttention with the weights of `module`."""

    def __init__(self, module: fastvit_kernels.SelfAttention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(module.proj.in_features, module.num_heads, batch_first=True)
        theirs = {"in_proj_weight": module.qkv.weight, "in_proj_bias": module.qkv.bias}
        theirs |= {"out_proj.weight": module.proj.weight, "out_proj.bias": module.proj.bias}
        self.attention.to(module.proj.weight).load_state_dict(theirs)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.attention(x_BND, x_BND, x_BND, need_weights=False)[0]


def timms(module: fastvit_kernels.SelfAttention) -> nn.Module:
    """timm's Attention with the weights of `module`."""
    theirs = timm.layers.Attention(module.proj.in_features, module.num_heads, qkv_bias=True)
    theirs.qkv, theirs.proj = module.qkv, module.proj
    return theirs


ROWS: dict[str, dict[str, Callable[[fastvit_kernels.SelfAttention], nn.Module]]] = {
    OPERATOR: dict.fromkeys(fastvit_kernels.implementations(), Operator),
    MODULE: {**dict.fromkeys(fastvit_kernels.implementations(), lambda module: module), TORCH: Torchs, TIMM: timms},
}
"""level to row to what makes the row's module of one that owns the weights"""


def self_attention(dim: int, heads: int, implementation: str) -> fastvit_kernels.SelfAttention:
    """The same weights each time, in float32 on the CPU."""
    draws = torch.Generator().manual_seed(0)
    module = fastvit_kernels.SelfAttention(
        nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads, implementation=implementation
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=dim**-0.5, generator=draws)
    return module


def made(
    level: str, passes: str, row: str, shape: tuple[int, int, int], dtype: torch.dtype, batch: int
) -> tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]:
    """A row's module and what is timed: a pass over the same tokens, with the same weights, for every row."""
    tokens, dim, heads = shape
    implementation = row if row in fastvit_kernels.implementations() else "fused"
    module = ROWS[level][row](self_attention(dim, heads, implementation).to(device(), dtype))
    x, upstream = torch.randn(2, batch, tokens, dim, generator=torch.Generator().manual_seed(1))
    inputs = x.to(device(), dtype, copy=True).requires_grad_()
    if passes == FORWARD:
        return module, partial(forward, module.eval(), inputs)  # torch's module has a faster path for evaluation
    return module, partial(forward_and_backward, module, inputs, upstream.to(device(), dtype))


@lru_cache(maxsize=1)  # the rows of a group follow each other
def reference(level: str, passes: str, shape: tuple[int, int, int], batch: int) -> tuple[Tensor, ...]:
    """What every row should compute, in float64."""
    _, run = made(level, passes, "naive", shape, torch.float64, batch)
    return run()


def build(level: str, passes: str, name: str, shape: tuple[int, int, int], dtype: str, graph: bool, batch: int) -> Work:
    module, run = made(level, passes, name, shape, DTYPES[dtype], batch)
    if graph:
        run = replayed(run)

    def check() -> None:
        for found, right in zip(run(), reference(level, passes, shape, batch), strict=True):
            assert_close(found, right, dtype, f"{name}'s {passes}")

    flops = batch * count_flops(made(level, passes, "fused", shape, torch.float32, 1)[1])
    saves = tuple(module.parameters()) if passes == BOTH else None
    return Work(run, check, batch, flops, saves, calls=CALLS[device().type], replayed=graph)


def forward(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output alone."""
    with torch.no_grad():
        return (module(x),)


def forward_and_backward(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of x and of the weights by size."""
    leaves: list[Tensor] = [x, *sorted(module.parameters(), key=Tensor.numel)]
    output = module(x)
    output.backward(upstream)
    gradients = [cast(Tensor, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return output.detach(), *gradients


def replayed(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """`run` recorded into a CUDA graph: what is left without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def cases() -> Iterator[Case]:
    graphs = (False, True) if device().type == "cuda" else (False,)
    for level, passes, (batch, *shape), dtype in product(ROWS, PASSES, SHAPES[device().type], DTYPES):
        tokens, dim, heads = shape
        for name, graph in product(ROWS[level], graphs):
            yield Case(
                f"{level} {passes}",
                f"B{batch} N{tokens} D{dim} H{heads}",
                dtype,
                f"{name}, CUDA graph" if graph else name,
                batch,
                partial(build, level, passes, name, (tokens, dim, heads), dtype, graph),
                None if name in (TORCH, TIMM) else unavailable(name),
            )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_attention(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

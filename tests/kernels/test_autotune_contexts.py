"""`auto` measures alike wherever it is called: in checkpointing, where operators are counted, mapped or exported."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastvit_kernels
from fastvit_kernels.autotune import chooser
from fastvit_kernels.fused import fused_attention
from tests.kernels.autotune_cases import only, slow


def counted_flops(attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        output = attention(x)
    assert counter.get_total_flops() == 2 * 2 * 5 * 16 * 48 + 2 * 2 * 2 * 5 * 5 * 16  # the projections and the products
    return output


def checkpointed(attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    output = checkpoint(attention, x.requires_grad_(), use_reentrant=False)
    output.sum().backward()
    return output.detach()


def differentiated(attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.vjp(attention, x)[0]


def mapped(attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.vmap(attention)(x[None])[0]


class OneCall(torch.nn.Module):
    """Attention as a module, which torch.export needs."""

    def __init__(self, attention: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def exported(attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.export.export(OneCall(attention), (x,)).module()(x)


@pytest.mark.parametrize("call", [counted_flops, checkpointed, differentiated, mapped, exported])
@pytest.mark.filterwarnings("error:attention auto")
def test_where_a_call_is_recorded_counted_or_traced_the_measuring_is_not(
    call: Callable[..., Tensor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, other=slow)
    x, weight, bias = torch.randn(2, 5, 16), torch.randn(48, 16), torch.randn(48)
    output = call(lambda x: fastvit_kernels.attention(x, weight, bias, 2), x)
    assert torch.allclose(output, fused_attention(x, weight, bias, 2, 0.0).detach(), atol=1e-6)
    assert set(next(iter(chooser._choices.values())).milliseconds) == {"fused", "other"}

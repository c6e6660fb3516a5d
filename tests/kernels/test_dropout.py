"""The factors that the Triton kernels draw for dropout. Without a GPU this runs in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit_kernels.triton_kernels.parts import dropout_factor

HEADS, QUERIES, KEYS = 24, 32, 64


@triton.jit
def _store_factors(seed_ptr, out_ptr, dropout_p, M: tl.constexpr, N_PAD: tl.constexpr):
    row_M = tl.arange(0, M)
    factor_MN = dropout_factor(tl.load(seed_ptr), tl.program_id(0), row_M, dropout_p, N_PAD)
    head_ptr = out_ptr + tl.program_id(0) * M * N_PAD
    tl.store(head_ptr + row_M[:, None] * N_PAD + tl.arange(0, N_PAD)[None, :], factor_MN)


def factors(seed: int, dropout_p: float, device: str, keys: int = KEYS) -> Tensor:
    """Return the factors of HEADS heads, (HEADS, QUERIES, keys)."""
    out = torch.empty(HEADS, QUERIES, keys, device=device)
    _store_factors[(HEADS,)](torch.tensor([seed], device=device), out, dropout_p, QUERIES, keys)
    return out.cpu()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_each_weight_is_kept_with_the_same_probability(dropout_p: float, triton_device: str, seed: int) -> None:
    drawn = factors(seed, dropout_p, triton_device)
    assert torch.allclose(drawn[drawn != 0], torch.tensor(1 / (1 - dropout_p)))
    kept = (drawn != 0).double()
    for place in (kept.mean((0, 1)), kept.mean((0, 2)), kept.mean((1, 2))):  # of keys, queries and heads
        deviation = (dropout_p * (1 - dropout_p) * len(place) / kept.numel()) ** 0.5
        assert ((place - (1 - dropout_p)).abs() < 6 * deviation).all()


def test_weights_of_one_call_are_independent(triton_device: str, seed: int) -> None:
    """A call of Philox draws for the keys whose indices differ in bits 0 and 3; here all distances are compared."""
    kept = (factors(seed, 0.5, triton_device) != 0).double() * 2 - 1
    for distance in range(1, KEYS):
        assert (kept * kept[..., torch.arange(KEYS) ^ distance]).mean().abs() < 6 / (kept.numel() / 2) ** 0.5
    for neighbour in (kept.roll(1, 0), kept.roll(1, 1)):  # of another head, of another query
        assert (kept * neighbour).mean().abs() < 6 / kept.numel() ** 0.5


@pytest.mark.slow
def test_a_factor_depends_on_seed_head_query_and_key_alone(triton_device: str, seed: int) -> None:
    drawn = factors(seed, 0.5, triton_device)
    assert torch.equal(drawn, factors(seed, 0.5, triton_device))
    assert torch.equal(drawn[..., :16], factors(seed, 0.5, triton_device, keys=16))
    assert not torch.equal(drawn, factors(seed + 1, 0.5, triton_device))
    assert not torch.equal(drawn, factors(seed + 2**40, 0.5, triton_device))

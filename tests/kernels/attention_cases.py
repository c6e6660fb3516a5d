"""Shapes, random arguments and the reference definition that the tests of the attention operator share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# (batch, tokens, dim, heads), with head dims 8, 12, 16, 24 and 64.
SHAPES = [
    (3, 64, 48, 4),
    (2, 65, 48, 4),
    (1, 1, 8, 1),
    (5, 7, 24, 3),
    (2, 50, 96, 6),
    (3, 33, 96, 4),
    (1, 197, 192, 3),
    (1, 256, 256, 4),
    (3, 5, 16, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Arguments = tuple[Tensor, Tensor, Tensor | None]


def draw(shape: tuple[int, int, int, int], bias: bool, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """Draw x, weight and bias that require gradients; the weight keeps the variance of x."""
    batch, tokens, dim, _ = shape
    x = torch.randn(batch, tokens, dim, dtype=torch.float64)
    weight = torch.randn(3 * dim, dim, dtype=torch.float64) * dim**-0.5
    qkv_bias = torch.randn(3 * dim, dtype=torch.float64) if bias else None
    x, weight, qkv_bias = (None if t is None else t.to(device, dtype).requires_grad_() for t in (x, weight, qkv_bias))
    return x, weight, qkv_bias


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return tuple(None if t is None else t.detach().to(dtype).requires_grad_() for t in arguments)


def split(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = torch.nn.functional.linear(x, weight, bias).view(batch, tokens, 3, heads, dim // heads)
    return qkv.permute(2, 0, 3, 1, 4)


def chain(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The definition as a chain of torch operators, in the dtype of the arguments."""
    q, k, v = split(x, weight, bias, heads)
    probabilities = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (probabilities @ v).transpose(1, 2).reshape(x.shape)


def sdpa_chain(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The same through torch's scaled_dot_product_attention."""
    attended = torch.nn.functional.scaled_dot_product_attention(*split(x, weight, bias, heads))
    return attended.transpose(1, 2).reshape(x.shape)


def passes(function: Callable[..., Tensor], arguments: Arguments, upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all arguments, converted to float64."""
    output = function(*arguments)
    gradients = torch.autograd.grad(output, [t for t in arguments if t is not None], upstream.to(output))
    return [t.detach().double() for t in (output, *gradients)]

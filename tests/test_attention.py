"""All implementations compute the same function, forward and backward."""

import math

import pytest
import timm
import torch
from torch import Tensor

import fastvit_kernels
from fastvit_train.models import ViT

NAMES = list(fastvit_kernels.implementations())
# (batch, tokens, dim, heads)
SHAPES = [(3, 64, 48, 4), (2, 65, 48, 4), (1, 1, 8, 1), (5, 7, 24, 3), (2, 50, 96, 6)]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """The definition, head by head."""
    qkv = x @ weight.T + (0 if bias is None else bias)
    outputs = []
    for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv.chunk(3, -1)), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        outputs.append(torch.softmax(scores, -1) @ v)
    return torch.cat(outputs, -1)


def draw(shape: tuple[int, int, int, int], bias: bool, dtype: torch.dtype) -> list[Tensor | None]:
    batch, tokens, dim, _ = shape
    x = torch.randn(batch, tokens, dim, dtype=torch.float64)
    weight = torch.randn(3 * dim, dim, dtype=torch.float64) * dim**-0.5
    tensors = [x, weight, torch.randn(3 * dim, dtype=torch.float64) if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def gradients(function, tensors: list[Tensor | None], heads: int) -> list[Tensor]:
    output = function(*tensors, heads)
    given = [t for t in tensors if t is not None]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), given)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_against_float64(name: str, shape: tuple[int, ...], bias: bool, seed: int) -> None:
    tensors = draw(shape, bias, torch.float32)
    ours = gradients(lambda *a: fastvit_kernels.attention(*a, implementation=name), tensors, shape[-1])
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    for got, expected in zip(ours, gradients(exact, doubles, shape[-1]), strict=True):
        assert (got.double() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_and_expanded_inputs(name: str, seed: int) -> None:
    _, weight, bias = draw((1, 1, 24, 3), True, torch.float32)
    for x in (
        torch.randn(7, 4, 24).transpose(0, 1),
        torch.randn(1, 7, 24).expand(4, -1, -1),
        torch.randn(4, 7, 30)[..., 3:27],
    ):
        ours = fastvit_kernels.attention(x, weight, bias, 3, implementation=name)
        assert torch.allclose(ours, exact(x, weight, bias, 3), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_zeroes_weights_and_keeps_the_mean(name: str, seed: int) -> None:
    x, weight, bias = (t.detach() for t in draw((1, 16, 8, 2), True, torch.float32))
    many = x.expand(4000, -1, -1)
    mean = fastvit_kernels.attention(many, weight, bias, 2, dropout_p=0.3, implementation=name).mean(0)
    assert torch.allclose(mean, exact(x, weight, bias, 2)[0], atol=0.15)
    once = fastvit_kernels.attention(x, weight, bias, 2, dropout_p=0.3, implementation=name)
    assert not torch.allclose(once, exact(x, weight, bias, 2), atol=1e-3)


@pytest.mark.parametrize("model_name", ["c_vit_4_4_32", "mc_vit_4_4_32", "cct_2_3x2_32"])
def test_one_checkpoint_gives_the_same_logits_and_gradients_under_each(model_name: str, seed: int) -> None:
    model = timm.create_model(model_name, initializer_range=0.2).eval()
    assert isinstance(model, ViT)
    images = torch.randn(4, 3, 32, 32)
    results = {}
    for name in NAMES:
        model.set_attention(name)
        model.zero_grad()
        logits = model(images)
        logits.logsumexp(1).sum().backward()
        results[name] = [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    for name in NAMES[1:]:
        for got, expected in zip(results[name], results[NAMES[0]], strict=True):
            assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "flash"}, "unknown attention implementation 'flash'; allowed: naive, fused, sdpa"),
        ({"x": torch.zeros(4, 8)}, r"x must be \(batch, tokens, dim\)"),
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

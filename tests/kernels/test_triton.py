"""The Triton kernels: registration with torch, limits, and torch.compile, autocast, DDP and checkpointing.

test_attention.py tests their results. Without a GPU everything runs in Triton's interpreter.
"""

import functools
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastvit_kernels
from fastvit_kernels.triton_kernels import attention as triton_limits
from fastvit_kernels.triton_kernels import fused as triton_fused
from fastvit_kernels.triton_kernels import packed as triton_packed
from fastvit_train.runs.run_folder import read_jsonl
from tests.kernels.accuracy import assert_accurate
from tests.kernels.attention_cases import cast, chain, draw, passes
from tests.support import launch, write_folder

FUSED, PACKED = (3, 9, 24, 3), (2, 9, 96, 4)
"""one shape for each of the two kernels"""
BOTH = pytest.mark.parametrize("shape", [FUSED, PACKED], ids=["fused", "packed"])
triton_attention = functools.partial(fastvit_kernels.attention, implementation="triton")


def half_precision(device: str) -> torch.dtype:
    """The dtype for autocast: GPUs before Ampere have no bfloat16."""
    has_bfloat16 = device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def test_each_kernel_supports_its_shapes() -> None:
    assert triton_fused.fits(64, 48, 4, torch.bfloat16)
    assert triton_fused.fits(65, 48, 4, torch.bfloat16)
    assert not triton_fused.fits(65, 48, 4, torch.float32)  # its scores would not fit into the registers
    assert not triton_fused.fits(64, 96, 4, torch.bfloat16)
    assert not triton_fused.fits(64, 64, 1, torch.bfloat16)  # nor would its gradients
    assert triton_fused.fits(64, 64, 2, torch.bfloat16)
    assert not triton_fused.fits(64, 64, 2, torch.float32)  # nor into the shared memory of a GeForce card


@pytest.mark.parametrize(
    ("x", "heads", "message"),
    [
        (torch.zeros(1, 257, 8), 1, r"up to \d+ tokens here, got 257; use sdpa"),
        (torch.zeros(1, 4, 130), 2, "up to 64 channels, got 65; use sdpa"),
        (torch.zeros(1, 4, 8, dtype=torch.float64), 2, "float32, bfloat16, float16, got torch.float64; use fused"),
    ],
)
def test_unsupported_arguments_are_refused(x: Tensor, heads: int, message: str, triton_device: str) -> None:
    x, dim = x.to(triton_device), x.shape[-1]
    with pytest.raises(ValueError, match=message):
        triton_attention(x, x.new_zeros(3 * dim, dim), None, heads)


@pytest.mark.parametrize(
    ("shared_memory", "limit"), [(48, 0), (64, 64), (99, 128), (163, 256), (227, 256)], ids=lambda value: str(value)
)
def test_the_gpus_shared_memory_limits_the_tokens(
    shared_memory: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_limits, "_shared_memory", lambda device: shared_memory * 1024)
    with FakeTensorMode():  # its tensors are on a GPU where there is none
        fitting, longer = (torch.empty(1, tokens, 48, device="cuda") for tokens in (max(limit, 1), limit + 1))
    if limit:
        assert triton_limits.why_unsupported(fitting, 4, torch.float16) is None
    assert triton_limits.why_unsupported(longer, 4, torch.float16) == (
        f"triton supports up to {limit} tokens here, got {limit + 1}; use sdpa for longer sequences"
    )


def test_the_limit_of_tokens_breaks_no_compiled_graph() -> None:
    limit = torch.compile(lambda x: x + triton_limits.max_tokens(99 * 1024), fullgraph=True, backend="eager")
    assert limit(torch.zeros(())) == 128


def test_turing_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_limits, "_shared_memory", lambda device: 64 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with FakeTensorMode():
        x = torch.empty(1, 64, 48, device="cuda")
    reason = triton_limits.why_unsupported(x, 4, torch.bfloat16)
    assert reason is not None and reason.endswith("8.0 (Ampere) or newer; use float16")
    assert triton_limits.why_unsupported(x, 4, torch.float16) is None


def arguments_of_operators(device: str) -> list[object]:
    """Arguments of all four custom operators, with and without the optional ones."""
    x, weight, bias = draw(FUSED, True, torch.float32, device)
    qkv = torch.randn(2, 9, 288, device=device, requires_grad=True)
    seed = torch.tensor([3], device=device)
    return [
        (triton_fused.fused_attention, (x, weight, bias, 3, 0.0, None)),
        (triton_fused.fused_attention, (x.detach().transpose(0, 1), weight, None, 3, 0.2, seed)),
        (triton_fused.fused_attention_backward, (x.detach(), x.detach(), weight.detach(), bias.detach(), 3, 0.2, seed)),
        (triton_packed.packed_attention, (qkv, 4, 0.0, None)),
        (triton_packed.packed_attention, (qkv, 4, 0.2, seed)),
        (triton_packed.packed_attention_backward, (qkv.detach()[..., :96], qkv.detach(), 4, 0.2, seed)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(6))
def test_opcheck(case: int, triton_device: str, seed: int) -> None:
    operator, arguments = arguments_of_operators(triton_device)[case]
    torch.library.opcheck(operator, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1, 2])
@BOTH
def test_gradients_of_a_part_of_the_arguments(
    shape: tuple[int, int, int, int], frozen: int, triton_device: str, seed: int
) -> None:
    arguments = draw(shape, True, torch.float32, triton_device)
    whole = torch.autograd.grad(triton_attention(*arguments, shape[-1]).square().sum(), arguments)
    arguments[frozen].requires_grad_(False)
    requiring_grad = [t for t in arguments if t.requires_grad]
    part = torch.autograd.grad(triton_attention(*arguments, shape[-1]).square().sum(), requiring_grad)
    expected = [g for i, g in enumerate(whole) if i != frozen]
    assert all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))


@BOTH
def test_the_flops_are_those_of_the_definition(shape: tuple[int, int, int, int], triton_device: str, seed: int) -> None:
    counts = []
    for name in ("triton", "fused"):
        with FlopCounterMode(display=False) as counter:
            x, weight, bias = draw(shape, True, torch.float32, triton_device)
            fastvit_kernels.attention(x, weight, bias, shape[-1], implementation=name).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@BOTH
def test_a_whole_graph_compiles_through_it(shape: tuple[int, int, int, int], triton_device: str, seed: int) -> None:
    arguments = draw(shape, True, torch.float32, triton_device)
    upstream = torch.randn(shape[:3], device=triton_device)
    eager = functools.partial(triton_attention, num_heads=shape[-1])
    compiled = torch.compile(eager, fullgraph=True)
    exact = passes(functools.partial(chain, heads=shape[-1]), cast(arguments, torch.float64), upstream)
    results, baseline = passes(compiled, arguments, upstream), passes(eager, arguments, upstream)
    for result, other, right in zip(results, baseline, exact, strict=True):
        assert_accurate([result.float()], [other.float()], [right])


@pytest.mark.slow
@BOTH
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(
    shape: tuple[int, int, int, int], triton_device: str, seed: int
) -> None:
    x, weight, bias = draw(shape, True, torch.float32, triton_device)
    dtype = half_precision(triton_device)
    with torch.autocast(triton_device, dtype):
        output = triton_attention(x, weight, bias, shape[-1])
    assert output.dtype == dtype
    output.float().square().sum().backward()
    arguments = tuple(t.detach() for t in (x, weight, bias))
    with torch.autocast(triton_device, dtype):
        baseline = chain(*arguments, shape[-1])
    exact = chain(*(t.double() for t in arguments), shape[-1])
    assert_accurate([output.detach()], [baseline], [exact])
    assert {t.grad.dtype for t in (x, weight, bias)} == {torch.float32}


@pytest.mark.slow
@BOTH
def test_the_weights_gradient_is_the_same_each_time(
    shape: tuple[int, int, int, int], triton_device: str, seed: int
) -> None:
    arguments = draw((9, *shape[1:]), True, torch.float32, triton_device)
    upstream = torch.randn(9, *shape[1:3], device=triton_device)
    function = functools.partial(triton_attention, num_heads=shape[-1])
    first, second = (passes(function, arguments, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_gradient_checkpointing_recomputes_the_same_dropout(triton_device: str, seed: int) -> None:
    model = timm.create_model("mc_vit_4_4_32", depth=2, patch_size=8, attn_drop_rate=0.3, attention="triton")
    model.train().to(triton_device)
    images, gradients = torch.randn(2, 3, 32, 32, device=triton_device), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(5)
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, this test would need two of them")
def test_two_processes_train_as_one_does_with_fused(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "shapes")
    flags = ["--dataset", "folder", "--data-dir", data, "--patch-size", 8, "--embed-dim", 16, "--depth", 1]
    flags += ["--num-heads", 2, "--batch-size", 12, "--epochs", 1, "--runs-dir", tmp_path / "runs", "--crop", "none"]
    losses = {}
    for name, processes in (("triton", 2), ("fused", 1)):
        done = launch(*flags, "--attention", name, "--exp-name", name, processes=processes, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stdout + done.stderr
        losses[name] = [row["loss"] for row in read_jsonl(tmp_path / "runs" / name / "steps.jsonl")]
    assert losses["triton"] == pytest.approx(losses["fused"], abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter; test_resources.py compiles the kernels")
def test_products_too_small_for_a_gpu_are_refused_by_the_kernels_themselves() -> None:
    """Triton's interpreter would accept them."""
    constants = triton_packed.constants(9, 32, 4, 0.0, torch.float32, triton_packed.Tiles(16, 4))
    qkv = torch.randn(1, 9, 96)
    triton_packed.forward_kernel[(4, 1)](qkv, qkv.new_empty(1, 9, 32), None, 1.0, 0.0, **constants)
    for too_small in ({"C_PAD": 8}, {"BLOCK": 8}):
        with pytest.raises(Exception, match=r"AssertionError|static"):
            triton_packed.forward_kernel[(4, 1)](
                qkv, qkv.new_empty(1, 9, 32), None, 1.0, 0.0, **{**constants, **too_small}
            )


@pytest.mark.slow
def test_autocast_leaves_the_conversion_of_the_weights_to_the_kernels(triton_device: str, seed: int) -> None:
    """The gradients of float32 weights are the sums in float32, not rounded to autocast's dtype."""
    x, weight, bias = draw(FUSED, True, torch.float32, triton_device)
    dtype = half_precision(triton_device)
    with torch.autocast(triton_device, dtype):
        output = triton_attention(x, weight, bias, FUSED[-1])
    output.float().square().sum().backward()
    assert not torch.equal(weight.grad, weight.grad.to(dtype).float())
    assert not torch.equal(bias.grad, bias.grad.to(dtype).float())

"""A training step: forward, loss, backward and optimizer, on a batch that is already on the device."""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.benchmark_case import CALLS, DTYPES, BenchmarkCase, Workload, assert_close, device
from bench.suites.bench_attention import why_unavailable
from fastvit_kernels.cuda_graph import record_graph
from fastvit_train.config.schema import OptimConfig
from fastvit_train.models import compile_model, pretrained_cfg, set_block
from fastvit_train.models.compiling import compile_function
from fastvit_train.profiling.roofline import count_flops
from fastvit_train.training.optim.optimizer import build_optimizer, device_lr, with_device_lr

MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"c_vit_4_4_32": (256,), "mc_vit_4_4_32": (256,), "cvt_7_4_32": (32,), "cct_7_3x1_32": (32,)},
    "cuda": {"c_vit_4_4_32": (256, 4096), "mc_vit_4_4_32": (256, 4096), "cvt_7_4_32": (256,), "cct_7_3x1_32": (256,)},
}
"""for each model its batch sizes"""
BLOCK = "block cpp"
"""the row whose blocks are one kernel each, attention included"""
EAGER = ("naive", "fused", "sdpa", "compiled", "cpp", BLOCK, "triton")
COMPILED = ("naive", "fused", "sdpa", "cpp", BLOCK, "triton")
MAIN = {(name, False) for name in EAGER if name != "compiled"} | {(name, True) for name in ("cpp", BLOCK, "triton")}
"""implementation, and whether the model is compiled, for each row of the comparison that is timed by default"""
GRAPHED = ("sdpa", "triton")
"""implementations for which the compiled step, optimizer included, is also recorded as one CUDA graph on a GPU"""
OPERATION = "training step"


def attention_of(implementation: str) -> str:
    """Return the attention of a row; the blocks' kernel includes `cpp`."""
    return "cpp" if implementation == BLOCK else implementation


class Training:
    """A model with its optimizer and a batch to train on, the same for every row.

    Args:
        name: name of the model.
        implementation: its attention implementation, or `BLOCK`.
        compiled: whether to compile the model.
        dtype: "fp32", or "bf16" for autocast to bfloat16.
        batch: number of images.
        settings: further settings of the model.
    """

    def __init__(self, name: str, implementation: str, compiled: bool, dtype: str, batch: int, **settings: Any) -> None:
        draws = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = timm.create_model(name, attention=attention_of(implementation), **settings).to(device())
        set_block(self.model, "cpp" if implementation == BLOCK else "torch")
        self.dtype = dtype
        self.optimizer = build_optimizer(self.model, OptimConfig())
        size = pretrained_cfg(self.model)["input_size"][-1]
        self.images_BCHW = torch.randn(batch, 3, size, size, generator=draws).to(device())
        self.labels_B = torch.randint(0, 10, (batch,), generator=draws).to(device())
        if compiled:
            compile_model(self.model, device(), graphed=device().type == "cuda")

    def precision(self) -> torch.autocast:
        """Return the autocast context of the forward pass."""
        return torch.autocast(device().type, torch.bfloat16, enabled=self.dtype == "bf16")

    def loss(self) -> Tensor:
        """Run the forward pass and return the loss."""
        with self.precision():
            logits = self.model(self.images_BCHW)
        return F.cross_entropy(logits.float(), self.labels_B)

    def step(self) -> Tensor:
        """Run one training step and return the loss."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def record(self) -> Callable[[], None]:
        """Record the compiled step as one CUDA graph, as our trainer does; return what replays it."""
        loss = compile_function(self.loss, device())
        learning_rates = device_lr(self.optimizer, device())

        def step() -> None:
            loss().backward()
            with with_device_lr(self.optimizer, learning_rates):
                self.optimizer.step()
            self.optimizer.zero_grad()

        return record_graph(step).replay

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the loss and all gradients in one tensor, computed without dropout so that they can be compared."""
        dropouts = (getattr(m, "attn_drop", 0) or (isinstance(m, nn.Dropout) and m.p) for m in self.model.modules())
        self.model.train(not any(dropouts))
        loss = self.loss()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        self.model.train()
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@lru_cache(maxsize=1)  # the rows of a group are consecutive
def reference(name: str, batch: int, settings: tuple[tuple[str, Any], ...]) -> tuple[Tensor, Tensor]:
    """Compute the expected loss and gradients of every row's first step."""
    return Training(name, "naive", False, "fp32", batch, **dict(settings)).loss_and_gradients()


def build(
    name: str,
    implementation: str,
    compiled: bool,
    dtype: str,
    batch: int,
    *,
    graphed: bool = False,
    **settings: Any,
) -> Workload:
    training = Training(name, implementation, compiled, dtype, batch, **settings)
    start = copy.deepcopy(training.model.state_dict())
    step = training.record() if graphed else training.step

    def check() -> None:
        training.model.load_state_dict(start)
        loss, gradients = training.loss_and_gradients()
        expected_loss, expected_gradients = reference(name, batch, tuple(settings.items()))
        assert_close(loss, expected_loss, dtype, f"{implementation}'s loss")
        assert_close(gradients, expected_gradients, dtype, f"{implementation}'s gradients")
        for _ in range(3):
            step()
        assert training.loss().item() < loss.item(), "three steps on one batch did not lower its loss"

    flops = batch * count_flops(Training(name, "fused", False, "fp32", 1, **settings).step)
    parameters = tuple(training.model.parameters())
    return Workload(step, check, batch, flops, parameters, calls=CALLS[device().type])


def cases() -> Iterator[BenchmarkCase]:
    sizes = [(name, batch) for name, batches in MODELS[device().type].items() for batch in batches]
    rows = [(name, False, False) for name in EAGER] + [(name, True, False) for name in COMPILED]
    if device().type == "cuda":
        rows += [(name, False, True) for name in GRAPHED]
    for (name, batch), dtype, (implementation, compiled, graphed) in product(sizes, DTYPES, rows):
        yield BenchmarkCase(
            OPERATION,
            f"{name} B{batch}",
            dtype,
            implementation + (", model compiled" if compiled else ", step graphed" if graphed else ""),
            batch,
            partial(build, name, implementation, compiled, dtype, graphed=graphed),
            why_unavailable(attention_of(implementation)),
            main=name == "mc_vit_4_4_32" and batch == 256 and (graphed or (implementation, compiled) in MAIN),
            quick_check=(name, implementation, compiled) == ("mc_vit_4_4_32", "cpp", False),
        )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_step(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

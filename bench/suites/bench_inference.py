"""Inference: the latency of one image, and the throughput of a large batch, from the model's input to its logits."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from bench.benchmark_case import CALLS, DTYPES, BenchmarkCase, Workload, assert_close, device
from bench.suites.bench_attention import replayed, why_unavailable
from bench.suites.bench_step import EAGER, MODELS, Training, attention_of
from fastvit_train.profiling.roofline import count_flops

LATENCY, THROUGHPUT = "inference latency", "inference throughput"
ROWS = {**{name: (name, False, False) for name in EAGER}, "fused, model compiled": ("fused", True, False)}
"""for each row the attention implementation, whether the model is compiled, and whether a CUDA graph is replayed"""
if torch.cuda.is_available():
    ROWS |= {"fused, model compiled, CUDA graph": ("fused", True, True)}


def build(name: str, implementation: str, compiled: bool, graph: bool, dtype: str, batch: int) -> Workload:
    training = Training(name, implementation, compiled, dtype, batch)

    def logits_of(training: Training) -> Callable[[], tuple[Tensor, ...]]:
        training.model.eval()

        def logits() -> tuple[Tensor, ...]:
            with torch.inference_mode(), training.precision():
                return (training.model(training.images_BCHW),)

        return logits

    run = logits_of(training)
    if graph:
        run = replayed(run)

    def check() -> None:
        reference = logits_of(Training(name, "naive", False, "fp32", batch))
        assert_close(run()[0], reference()[0], dtype, f"{name}'s logits")

    flops = batch * count_flops(logits_of(Training(name, "fused", False, "fp32", 1)))
    return Workload(run, check, batch, flops, calls=CALLS[device().type])


def cases() -> Iterator[BenchmarkCase]:
    for operation, name, dtype in product((LATENCY, THROUGHPUT), ("mc_vit_4_4_32", "cvt_7_4_32"), DTYPES):
        batch = 1 if operation == LATENCY else max(MODELS[device().type][name])
        for row, (implementation, compiled, graph) in ROWS.items():
            yield BenchmarkCase(
                operation,
                f"{name} B{batch}",
                dtype,
                row,
                batch,
                partial(build, name, implementation, compiled, graph, dtype),
                why_unavailable(attention_of(implementation)),
                quick_check=(operation, name, dtype, row) == (LATENCY, "mc_vit_4_4_32", "bf16", "fused"),
            )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_inference(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

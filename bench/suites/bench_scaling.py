"""How the time of mc-ViT's training step grows with the batch size, the number of tokens and their width."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest

from bench.benchmark_case import DTYPES, BenchmarkCase, device
from bench.suites.bench_attention import why_unavailable
from bench.suites.bench_step import build

MODEL = "mc_vit_4_4_32"
IMPLEMENTATIONS = ("naive", "fused", "sdpa", "cpp", "triton")
FACTOR = 1 if device().type == "cpu" else 8
WITH_BATCH, WITH_TOKENS, WITH_WIDTH = (f"scaling with {size}" for size in ("batch", "tokens", "width"))
SIZES: dict[str, list[tuple[int, int, dict[str, Any]]]] = {
    WITH_BATCH: [(batch, batch, {}) for batch in (128 * FACTOR, 512 * FACTOR, 2048 * FACTOR)],
    WITH_TOKENS: [((32 // patch) ** 2, 128 * FACTOR, {"patch_size": patch}) for patch in (8, 4, 2)],
    WITH_WIDTH: [(width, 128 * FACTOR, {"embed_dim": width}) for width in (48, 96, 192)],
}
"""for each operation its sizes, each with the batch size and the model's settings"""
UNITS = {WITH_BATCH: "B", WITH_TOKENS: "N", WITH_WIDTH: "D"}


def cases() -> Iterator[BenchmarkCase]:
    for (operation, sizes), dtype, name in product(SIZES.items(), DTYPES, IMPLEMENTATIONS):
        for size, batch, settings in sizes:
            yield BenchmarkCase(
                operation,
                f"{MODEL} with {name} attention",
                dtype,
                f"{UNITS[operation]}{size}",
                batch,
                partial(build, MODEL, name, False, dtype, **settings),
                why_unavailable(name),
                quick_check=(operation, size, dtype, name) == (WITH_BATCH, sizes[0][0], "bf16", "fused"),
            )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_scaling(case: BenchmarkCase, measure: Callable[[BenchmarkCase], None]) -> None:
    measure(case)

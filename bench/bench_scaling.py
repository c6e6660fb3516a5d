"""How the cost of mc-ViT's training step grows: with the batch, the tokens of an image, the width of a token."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest

from bench.bench_attention import unavailable
from bench.bench_step import build
from bench.case import DTYPES, Case, device

MODEL = "mc_vit_4_4_32"
IMPLEMENTATIONS = ("naive", "fused", "sdpa", "cpp", "triton")
FACTOR = 1 if device().type == "cpu" else 8
WITH_BATCH, WITH_TOKENS, WITH_WIDTH = (f"scaling with {what}" for what in ("batch", "tokens", "width"))
SIZES: dict[str, list[tuple[int, int, dict[str, Any]]]] = {
    WITH_BATCH: [(batch, batch, {}) for batch in (128 * FACTOR, 512 * FACTOR, 2048 * FACTOR)],
    WITH_TOKENS: [((32 // patch) ** 2, 128 * FACTOR, {"patch_size": patch}) for patch in (8, 4, 2)],
    WITH_WIDTH: [(width, 128 * FACTOR, {"embed_dim": width}) for width in (48, 96, 192)],
}
"""what grows to its sizes: the size, the batch, the model's settings"""
UNITS = {WITH_BATCH: "B", WITH_TOKENS: "N", WITH_WIDTH: "D"}


def cases() -> Iterator[Case]:
    for (what, sizes), dtype, name in product(SIZES.items(), DTYPES, IMPLEMENTATIONS):
        for size, batch, settings in sizes:
            yield Case(
                what,
                f"{MODEL} with {name} attention",
                dtype,
                f"{UNITS[what]}{size}",
                batch,
                partial(build, MODEL, name, False, dtype, **settings),
                unavailable(name),
                slow_check=size != sizes[0][0],  # larger ones check nothing else
            )


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.id)
def test_scaling(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)

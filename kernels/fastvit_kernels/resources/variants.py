"""The kernels that the shapes in use need: one for each shape, dtype and compute capability."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastvit_kernels.resources.chips import CHIPS
from fastvit_kernels.triton_kernels import fused
from fastvit_kernels.triton_kernels.attention import max_tokens

SHAPES = {
    "mc_vit_4_4_32": (64, 48, 4),
    "c_vit_4_4_32": (65, 48, 4),
    "cct_2_3x2_32": (64, 128, 2),
    "cvt_7_4_32": (64, 256, 4),
    "vit_lite_7_4_32": (65, 256, 4),
    "cct_7_3x1_32": (256, 256, 4),
    "vit_tiny_patch16_224": (197, 192, 3),
    "patches of 2 pixels": (256, 48, 4),
    "one wide head": (64, 64, 1),
    "two wide heads": (65, 64, 2),
    "two heads of 32": (64, 64, 2),
    "one token": (1, 8, 1),
    "odd sizes": (7, 24, 3),
    "heads of 16": (50, 96, 6),
    "heads of 24": (50, 96, 4),
}
"""(tokens, dim, heads)"""
DROPOUT_SHAPES = [name for name in SHAPES if "vit" in name or "cct" in name]
FUSED = ("fused.forward", "fused.backward_x", "fused.backward_weight")
PACKED = ("packed.forward", "packed.backward")
OTHERS = ("mlp.forward", "mlp.backward_x", "mlp.backward_weight", "muon.update")
"""only for models of 48 channels; they do not depend on the number of tokens, so those of c_vit_4_4_32 are the same"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class KernelVariant(NamedTuple):
    """One kernel for one shape, dtype and compute capability."""

    shape: str
    kernel: str
    dtype: str
    capability: int
    dropout: bool

    @property
    def words(self) -> set[str]:
        """What selects this kernel on the command line: its shape, name, dtype, capability, and dropout."""
        return {self.shape, self.kernel, self.dtype, f"sm_{self.capability}", *(["dropout"] if self.dropout else [])}


def variants() -> Iterator[KernelVariant]:
    """All kernels that the shapes in use need."""
    for shape, dtype, capability in itertools.product(SHAPES, DTYPES, CHIPS):
        if SHAPES[shape][0] > max_tokens(CHIPS[capability].shared_limit):
            continue
        if dtype == "bf16" and capability < 80:
            continue
        kernels = FUSED if fused.fits(*SHAPES[shape], DTYPES[dtype]) else PACKED
        for kernel, dropout in itertools.product(kernels, (False, True) if shape in DROPOUT_SHAPES else (False,)):
            yield KernelVariant(shape, kernel, dtype, capability, dropout)
        if shape == "mc_vit_4_4_32":
            for kernel in OTHERS if dtype == "fp32" else OTHERS[:-1]:
                yield KernelVariant(shape, kernel, dtype, capability, False)

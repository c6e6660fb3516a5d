"""Self-attention over short sequences, and the MLP of a block: operators with interchangeable implementations.

Every implementation of attention computes the same function of the same, merged parameters (Vaswani et al. 2017, eq. 1,
per head), so every checkpoint works with every implementation.
"""

from fastvit_kernels.autotune import Choice, Mode, choose, preferred
from fastvit_kernels.block import (
    BLOCKS,
    BlockParameters,
    BlockSettings,
    check_block,
    draw_seed,
    transformer_block,
    why_block_unsupported,
)
from fastvit_kernels.cpp.gelu import GELULinear
from fastvit_kernels.mlp import MAX_MLP_DIM, check_mlp, residual_mlp
from fastvit_kernels.module import SelfAttention, can_swap_attention, is_plain, swap_attention
from fastvit_kernels.operator import attention, attention_weights
from fastvit_kernels.registry import AUTO, COMPILING, check_implementation, implementations, why_unsupported

__all__ = [
    "AUTO",
    "BLOCKS",
    "COMPILING",
    "MAX_MLP_DIM",
    "BlockParameters",
    "BlockSettings",
    "Choice",
    "GELULinear",
    "Mode",
    "SelfAttention",
    "attention",
    "attention_weights",
    "can_swap_attention",
    "check_block",
    "check_implementation",
    "check_mlp",
    "choose",
    "draw_seed",
    "implementations",
    "is_plain",
    "preferred",
    "residual_mlp",
    "swap_attention",
    "transformer_block",
    "why_block_unsupported",
    "why_unsupported",
]

"""Self-attention over short sequences, and the MLP of a block: operators with interchangeable implementations.

Every implementation of attention computes the same function of the same, merged parameters (Vaswani et al. 2017, eq. 1,
per head), so every checkpoint works with every implementation.
"""

from fastvit_kernels.autotune import Choice, Mode, choose, preferred
from fastvit_kernels.cpp.gelu import GELULinear
from fastvit_kernels.mlp import MAX_MLP_DIM, check_mlp, residual_mlp
from fastvit_kernels.module import SelfAttention, can_swap_attention, swap_attention
from fastvit_kernels.operator import attention, attention_weights
from fastvit_kernels.registry import AUTO, COMPILING, check_implementation, implementations, why_unsupported

__all__ = [
    "AUTO",
    "COMPILING",
    "MAX_MLP_DIM",
    "Choice",
    "GELULinear",
    "Mode",
    "SelfAttention",
    "attention",
    "attention_weights",
    "can_swap_attention",
    "check_implementation",
    "check_mlp",
    "choose",
    "implementations",
    "preferred",
    "residual_mlp",
    "swap_attention",
    "why_unsupported",
]

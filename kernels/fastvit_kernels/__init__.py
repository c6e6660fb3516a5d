"""Self-attention over short sequences, one operator with interchangeable implementations.

Every implementation computes the same function of the same, merged parameters (Vaswani et al. 2017, eq. 1,
per head), so swapping one for another never touches a checkpoint.
"""

from fastvit_kernels.autotune import Choice, choose
from fastvit_kernels.cpp_gelu import GELULinear
from fastvit_kernels.module import SelfAttention, swap_attention, swappable
from fastvit_kernels.operator import attention, attention_weights
from fastvit_kernels.registry import AUTO, COMPILING, check_implementation, implementations, unsuited

__all__ = [
    "AUTO",
    "COMPILING",
    "Choice",
    "GELULinear",
    "SelfAttention",
    "attention",
    "attention_weights",
    "check_implementation",
    "choose",
    "implementations",
    "swap_attention",
    "swappable",
    "unsuited",
]

"""The hand-written kernels behind one call: which of the two serves a shape, and what neither can."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.triton_fused import fits, fused_attention
from fastvit_kernels.triton_packed import packed_attention
from fastvit_kernels.triton_parts import DTYPES, new_seed

MAX_TOKENS = 256
MAX_TOKENS_SMALL = 128
"""on GPUs with less shared memory for a program than an A100's 163 KB, such as all GeForce"""
SHARED_MEMORY = 163 * 1024
MAX_HEAD_DIM = 64


def refusal(x: Tensor, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernels can't serve tokens `x`, multiplied in `dtype`, or None where they can."""
    _, tokens, dim = x.shape
    limit = MAX_TOKENS_SMALL if x.is_cuda and _shared_memory(x.device) < SHARED_MEMORY else MAX_TOKENS
    if tokens > limit:
        return f"triton holds whole rows of up to {limit} tokens here, got {tokens}; take sdpa for longer sequences"
    if dim // num_heads > MAX_HEAD_DIM:
        return f"triton takes heads of up to {MAX_HEAD_DIM} channels, got {dim // num_heads}; take sdpa for wider ones"
    if dtype not in DTYPES:
        return f"triton takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got {dtype}; take fused"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # some versions' annotations don't know the field
    return int(properties.shared_memory_per_block_optin)


def triton_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`; `refusal` says what it takes."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, qkv_weight = x.to(dtype), qkv_weight.to(dtype)
        qkv_bias = None if qkv_bias is None else qkv_bias.to(dtype)
    seed = new_seed(x) if dropout_p else None
    if fits(x.shape[1], x.shape[2], num_heads, x.dtype):
        return fused_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p, seed)
    return packed_attention(F.linear(x, qkv_weight, qkv_bias), num_heads, dropout_p, seed)

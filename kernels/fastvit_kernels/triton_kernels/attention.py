"""The `triton` implementation: select one of the two kernels for a shape, and state the limits of both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.triton_kernels.fused import fits, fused_attention
from fastvit_kernels.triton_kernels.packed import packed_attention
from fastvit_kernels.triton_kernels.parts import DTYPES, new_seed

MAX_TOKENS = {163 * 1024: 256, 99 * 1024: 128, 64 * 1024: 64}
"""tokens by the bytes of shared memory that one program may use; the kernels need less, with dropout or without"""
MAX_HEAD_DIM = 64


def why_unsupported(x: Tensor, num_heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not support tokens `x` and matrix products in `dtype`, or None if they do."""
    _, tokens, dim = x.shape
    limit = max_tokens(_shared_memory(x.device)) if x.is_cuda else max(MAX_TOKENS.values())
    if tokens > limit:
        return f"triton supports up to {limit} tokens here, got {tokens}; use sdpa for longer sequences"
    if dim // num_heads > MAX_HEAD_DIM:
        return (
            f"triton supports heads of up to {MAX_HEAD_DIM} channels, got {dim // num_heads}; use sdpa for wider ones"
        )
    if dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        return f"triton supports {names}, got {dtype}; use fused"
    if dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "triton supports bfloat16 on GPUs of compute capability 8.0 (Ampere) or newer; use float16"
    return None


def max_tokens(shared_memory: int) -> int:
    """Return the longest supported sequence where a program may use `shared_memory` bytes."""
    return max(tokens if needed <= shared_memory else 0 for needed, tokens in MAX_TOKENS.items())


def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # some versions' annotations lack the field
    return int(properties.shared_memory_per_block_optin)


def triton_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`; `why_unsupported` states the limits."""
    if torch.is_autocast_enabled(x.device.type):  # the weights are converted by the kernels, and by F.linear
        x = x.to(torch.get_autocast_dtype(x.device.type))
    seed = new_seed(x) if dropout_p else None
    if fits(x.shape[1], x.shape[2], num_heads, x.dtype):
        return fused_attention(x, qkv_weight, qkv_bias, num_heads, dropout_p, seed)
    return packed_attention(F.linear(x, qkv_weight, qkv_bias), num_heads, dropout_p, seed)

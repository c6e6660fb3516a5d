"""One merged QKV projection and an explicit softmax over all heads at once.

Shape suffixes: B batch, N tokens, D dim, H heads, C channels of one head (D = H * C).
"""

import torch.nn.functional as F
from torch import Tensor


def split_heads(
    x_BND: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project x with the merged weights to query, key and value, each (batch, heads, tokens, head_dim)."""
    return split_projections(F.linear(x_BND, qkv_weight, qkv_bias), num_heads)


def split_projections(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (batch, tokens, 3*dim) into query, key and value, each (batch, heads, tokens, head_dim)."""
    q_BHNC, k_BHNC, v_BHNC = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q_BHNC, k_BHNC, v_BHNC


def probabilities(q_BHNC: Tensor, k_BHNC: Tensor) -> Tensor:
    """Softmax of the scaled scores, (batch, heads, tokens, tokens)."""
    # Scaling the query instead of the scores costs head_dim/tokens as much.
    scale = q_BHNC.shape[-1] ** -0.5
    return ((q_BHNC * scale) @ k_BHNC.transpose(-2, -1)).softmax(-1)


def fused_attention(
    x_BND: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`."""
    q_BHNC, k_BHNC, v_BHNC = split_heads(x_BND, qkv_weight, qkv_bias, num_heads)
    probs_BHNN = probabilities(q_BHNC, k_BHNC)
    if dropout_p:
        probs_BHNN = F.dropout(probs_BHNN, dropout_p)
    return (probs_BHNN @ v_BHNC).transpose(1, 2).flatten(2)

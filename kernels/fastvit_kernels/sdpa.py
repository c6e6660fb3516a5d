"""One merged QKV projection and torch's scaled_dot_product_attention, which selects its backend."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.fused import split_heads


def sdpa_attention(
    x_BND: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`."""
    q_BHNC, k_BHNC, v_BHNC = split_heads(x_BND, qkv_weight, qkv_bias, num_heads)
    output_BHNC = F.scaled_dot_product_attention(q_BHNC, k_BHNC, v_BHNC, dropout_p=dropout_p)
    return output_BHNC.transpose(1, 2).flatten(2)

"""One merged QKV projection and torch's scaled_dot_product_attention, which selects its backend."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.fused import split_heads


def sdpa_attention(
    x_BND: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`."""
    return attend(*split_heads(x_BND, qkv_weight, qkv_bias, num_heads), dropout_p)


def attend(q_BHNC: Tensor, k_BHNC: Tensor, v_BHNC: Tensor, dropout_p: float) -> Tensor:
    """Return the heads' outputs concatenated, (batch, tokens, dim)."""
    output_BHNC = F.scaled_dot_product_attention(q_BHNC, k_BHNC, v_BHNC, dropout_p=dropout_p)
    return output_BHNC.transpose(1, 2).flatten(2)

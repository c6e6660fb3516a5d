"""A loop over the heads, the plainest way to write attention: the reference and the baseline.

Shape suffixes: B batch, N tokens, D dim, H heads, C channels of one head (D = H * C).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_attention(
    x_BND: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int, dropout_p: float
) -> Tensor:
    """See `fastvit_kernels.attention`."""
    head_dim = x_BND.shape[-1] // num_heads
    query_weights, key_weights, value_weights = (part.split(head_dim) for part in qkv_weight.chunk(3))
    no_bias = [(None,) * num_heads] * 3
    query_biases, key_biases, value_biases = (
        no_bias if qkv_bias is None else (part.split(head_dim) for part in qkv_bias.chunk(3))
    )
    outputs_BNC = []
    for head in range(num_heads):
        q_BNC = F.linear(x_BND, query_weights[head], query_biases[head])
        k_BNC = F.linear(x_BND, key_weights[head], key_biases[head])
        v_BNC = F.linear(x_BND, value_weights[head], value_biases[head])
        probs_BNN = (q_BNC @ k_BNC.transpose(-2, -1) * head_dim**-0.5).softmax(-1)
        outputs_BNC.append(F.dropout(probs_BNN, dropout_p) @ v_BNC)
    return torch.cat(outputs_BNC, dim=-1)

"""Convert timm's Vision Transformer blocks to `Block`."""

from typing import Any

import timm.layers
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

import fastvit_kernels
from fastvit_train.models.vit.block import Block, Mlp

ADAPTED = "layers with adapters or hooks"


def is_timm_block(module: nn.Module) -> bool:
    """Whether `module` is a block that `block_from_timm` may be able to replace."""
    return type(module) is TimmBlock


def why_not_plain(block: Any) -> list[str]:
    """List what timm's `block` computes that ours does not."""
    mlp, paths = block.mlp, (block.drop_path1, block.drop_path2)
    norms = [type(norm) in (nn.LayerNorm, timm.layers.LayerNorm) for norm in (block.norm1, block.norm2)]
    plain_mlp = type(mlp) is timm.layers.Mlp and isinstance(mlp.norm, nn.Identity) and type(mlp.fc1) is nn.Linear
    layers = (block.norm1, block.attn.qkv, block.attn.proj, block.norm2, *((mlp.fc1, mlp.fc2) if plain_mlp else ()))
    extras = {
        "layer scale": not isinstance(block.ls1, nn.Identity) or not isinstance(block.ls2, nn.Identity),
        "another norm than LayerNorm": not all(norms),
        "another MLP than two linear layers with GELU": not plain_mlp or type(mlp.act) is not nn.GELU,
        "linear layers without bias": block.attn.proj.bias is None or (plain_mlp and mlp.fc1.bias is None),
        "dropout": any(isinstance(m, nn.Dropout) and m.p and m is not block.attn.attn_drop for m in block.modules()),
        ADAPTED: all(norms) and not all(map(fastvit_kernels.is_plain, layers)),
        "unscaled stochastic depth": any(not getattr(path, "scale_by_keep", True) for path in paths),
    }
    return [extra for extra, present in extras.items() if present]


def block_from_timm(block: Any) -> Block:
    """Return a `Block` that uses the modules of timm's `block`. The names of the parameters do not change.

    Its attention must already be a `fastvit_kernels.SelfAttention`, see `fastvit_kernels.swap_attention`.
    """
    attn: fastvit_kernels.SelfAttention = block.attn
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    mlp = Mlp(fc1.in_features, fc1.out_features, block.mlp.act.approximate, hidden_drop=0.0, drop=0.0)
    mlp.fc1, mlp.fc2.weight, mlp.fc2.bias = fc1, fc2.weight, fc2.bias
    ours = Block(fc1.in_features, attn, mlp, getattr(block.drop_path1, "drop_prob", 0.0), residual_norm=False)
    ours.norm1, ours.norm2 = block.norm1, block.norm2
    return ours.to(fc1.weight.device).train(block.training)

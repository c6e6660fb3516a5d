"""What a model looks at: its attention, and what it has learned about places and patches.

Shape suffixes: B batch, H heads, N tokens, P tokens that are patches (the others come first).
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.utils.errors import UserError


@dataclass(frozen=True)
class AttentionMaps:
    """Where a model looked in each image of a batch, float32 on the CPU."""

    attention: list[Tensor]
    """per layer the attention probabilities, (batch, heads, tokens, tokens); row i says where token i looks"""
    pooling: str
    """what `pooled` is, in words"""
    pooled: Tensor
    """how much of what the classifier reads comes from each patch in the last layer, (batch, grid_h, grid_w)"""
    rollout: Tensor
    """the same, followed through all layers down to the image, (batch, grid_h, grid_w)"""
    readers: slice
    """the tokens that stand for the image: the class token, or all patches"""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches, rows and columns."""
        return self.pooled.shape[1], self.pooled.shape[2]

    def layer_maps(self, layer: int) -> Tensor:
        """Where each head of a layer looks, (batch, heads, grid_h, grid_w): the class token, or the patches' mean."""
        return _patches(_read(self.attention[layer], self.readers), self.grid)


@torch.no_grad()
def attention_maps(model: nn.Module, inputs_BCHW: Tensor) -> AttentionMaps:
    """Run `model` on normalised images, (batch, channels, height, width), and note where it looks.

    The probabilities are computed anew from each attention's input and merged weights, so they are the same whatever
    implementation the model computes with. Rollout: Abnar & Zuidema 2020 (https://arxiv.org/abs/2005.00928), with half
    of each layer's weight on its residual connection.

    Raises:
        UserError: where the model's attention isn't the plain one, or its tokens aren't the patches of a grid.
    """
    grid, readers = _grid(model), _readers(model)
    attention: list[Tensor] = []
    pool_weights: list[Tensor] = []
    own_pool = getattr(model, "attention_pool", None)
    hooks = [
        module.register_forward_pre_hook(lambda module, args: attention.append(_probabilities(module, args[0])))
        for module in model.modules()
        if isinstance(module, fastvit_kernels.SelfAttention)
    ]
    if isinstance(own_pool, nn.Linear):
        hook = own_pool.register_forward_hook(
            lambda _, __, scores: pool_weights.append(scores.float().softmax(1).cpu())
        )
        hooks.append(hook)
    try:
        model.eval()(inputs_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = {layer.shape[-1] for layer in attention}
    if len(lengths) != 1 or min(lengths) < grid[0] * grid[1]:
        raise UserError(f"{type(model).__name__}'s attention is not over a grid of patches: there is no picture of it")
    if pool_weights:
        pooling = "pooling weights"
        starts_BN = read_BN = pool_weights[0].squeeze(-1)
    else:
        pooling = "the class token's attention" if readers.stop else "the patches' mean attention"
        read_BN = _read(attention[-1], readers).mean(1)
        starts_BN = torch.zeros_like(read_BN)
        starts_BN[:, readers] = 1 / starts_BN[0, readers].numel()
    rollout_BN = (starts_BN[:, None] @ rolled_out(attention)).squeeze(1)
    return AttentionMaps(attention, pooling, _patches(read_BN, grid), _patches(rollout_BN, grid), readers)


def rolled_out(attention: list[Tensor]) -> Tensor:
    """How much of each token (column) has come into each (row) by the last layer, (batch, tokens, tokens)."""
    eye = torch.eye(attention[0].shape[-1])
    return reduce(lambda below, layer_BHNN: (layer_BHNN.mean(1) + eye) / 2 @ below, attention, eye)


def position_similarity(model: nn.Module) -> Tensor | None:
    """Cosine similarity of every patch's position embedding with every other's, (grid_h, grid_w, grid_h, grid_w).

    None where the model has none.
    """
    positions = getattr(model, "pos_embed", None)
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return None
    grid = _grid(model)
    patches_PD = positions.detach().float().cpu()[0, -grid[0] * grid[1] :]
    unit_PD = nn.functional.normalize(patches_PD, dim=1)
    return (unit_PD @ unit_PD.T).unflatten(1, grid).unflatten(0, grid)


def patch_filters(model: nn.Module) -> Tensor | None:
    """The first layer's filters, strongest first, (filters, 3, height, width); None where it doesn't see colours."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.weight.shape[1] != 3:
        return None
    filters = first.weight.detach().float().cpu()
    return filters[filters.flatten(1).norm(dim=1).argsort(descending=True)]


def _read(layer_BHNN: Tensor, readers: slice) -> Tensor:
    """What the tokens that stand for the image read of each, on average, (batch, heads, tokens)."""
    return layer_BHNN[..., readers, :].mean(-2)


def _patches(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """(..., tokens) to (..., grid_h, grid_w): the patches come last."""
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)


def _probabilities(module: Any, x_BND: Tensor) -> Tensor:
    """The attention probabilities of `module` on its input, (batch, heads, tokens, tokens)."""
    bias = None if module.qkv.bias is None else module.qkv.bias.float()
    with torch.autocast(x_BND.device.type, enabled=False):
        weights = fastvit_kernels.attention_weights(x_BND.float(), module.qkv.weight.float(), bias, module.num_heads)
    return weights.cpu()


def _grid(model: nn.Module) -> tuple[int, int]:
    """The patches' rows and columns."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or not fastvit_kernels.can_swap_attention(model):
        raise UserError(f"{type(model).__name__} is no plain vision transformer: its attention can't be looked at")
    return int(grid[0]), int(grid[1])


def _readers(model: nn.Module) -> slice:
    """The tokens that the classifier reads: the class token, which is the first, or the patches."""
    pool = getattr(model, "global_pool", None)
    if pool in ("cls", "token"):
        return slice(0, 1)
    if pool in ("seq", "avg"):
        return slice(int(getattr(model, "num_prefix_tokens", 0)), None)
    raise UserError(f"{type(model).__name__} pools its tokens by {pool!r}: what it reads of them can't be looked at")

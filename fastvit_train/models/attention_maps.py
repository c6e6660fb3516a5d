"""Attention maps of a model, the similarity of its position embeddings, and its patch filters.

Shape suffixes: B batch, H heads, N tokens, P tokens that are patches (the other tokens come first).
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

import fastvit_kernels
from fastvit_train.models.blocks import composed
from fastvit_train.utils.errors import UserError


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of a model on each image of a batch; tensors are float32 on the CPU."""

    attention: list[Tensor]
    """attention probabilities of each layer, (batch, heads, tokens, tokens); row i holds what token i attends to"""
    pooling: str
    """what `pooled` shows, in words"""
    pooled: Tensor
    """weight of each patch of the last layer in the classifier's input, (batch, grid_h, grid_w)"""
    rollout: Tensor
    """the same, propagated through all layers to the image (attention rollout), (batch, grid_h, grid_w)"""
    readers: slice
    """the tokens that the classifier reads: the class token, or all patches"""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.pooled.shape[1], self.pooled.shape[2]

    def layer_maps(self, layer: int) -> Tensor:
        """Return what the readers attend to in each head of a layer, on average, (batch, heads, grid_h, grid_w)."""
        return _patches(_read(self.attention[layer], self.readers), self.grid)


@torch.no_grad()
def attention_maps(model: nn.Module, inputs_BCHW: Tensor) -> AttentionMaps:
    """Run `model` on normalized images (batch, channels, height, width) and return its attention maps.

    The probabilities are recomputed from the input and the merged weights of each attention, so they do not depend on
    the implementation that the model uses. Rollout: Abnar & Zuidema 2020 (https://arxiv.org/abs/2005.00928), with half
    of each layer's weight on its residual connection.

    Raises:
        UserError: if the model's attention is not plain self-attention, or if its tokens are not a grid of patches.
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
        with composed(model):
            model.eval()(inputs_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = {layer.shape[-1] for layer in attention}
    if len(lengths) != 1 or min(lengths) < grid[0] * grid[1]:
        raise UserError(
            f"{type(model).__name__}'s attention is not over a grid of patches, so it has no attention maps"
        )
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
    """Return the share of each input token (column) in each token of the last layer (row), (batch, tokens, tokens)."""
    eye = torch.eye(attention[0].shape[-1])
    return reduce(lambda below, layer_BHNN: (layer_BHNN.mean(1) + eye) / 2 @ below, attention, eye)


def position_similarity(model: nn.Module) -> Tensor | None:
    """Return the cosine similarity of all pairs of patch position embeddings, (grid_h, grid_w, grid_h, grid_w).

    None if the model has no position embeddings.
    """
    positions = getattr(model, "pos_embed", None)
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return None
    grid = _grid(model)
    patches_PD = positions.detach().float().cpu()[0, -grid[0] * grid[1] :]
    unit_PD = nn.functional.normalize(patches_PD, dim=1)
    return (unit_PD @ unit_PD.T).unflatten(1, grid).unflatten(0, grid)


def patch_filters(model: nn.Module) -> Tensor | None:
    """Return the first layer's filters by decreasing norm, (filters, 1 or 3, height, width); None if it has others."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.weight.shape[1] not in (1, 3):
        return None
    filters = first.weight.detach().float().cpu()
    return filters[filters.flatten(1).norm(dim=1).argsort(descending=True)]


def _read(layer_BHNN: Tensor, readers: slice) -> Tensor:
    """Return the mean attention of the `readers` to each token, (batch, heads, tokens)."""
    return layer_BHNN[..., readers, :].mean(-2)


def _patches(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape the patches, which are the last tokens, from (..., tokens) to (..., grid_h, grid_w)."""
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)


def _probabilities(module: Any, x_BND: Tensor) -> Tensor:
    """Return the attention probabilities of `module` for its input, (batch, heads, tokens, tokens)."""
    bias = None if module.qkv.bias is None else module.qkv.bias.float()
    with torch.autocast(x_BND.device.type, enabled=False):
        weights = fastvit_kernels.attention_weights(x_BND.float(), module.qkv.weight.float(), bias, module.num_heads)
    return weights.cpu()


def _grid(model: nn.Module) -> tuple[int, int]:
    """Return the number of rows and columns of patches."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or not fastvit_kernels.can_swap_attention(model):
        raise UserError(f"{type(model).__name__} is not a plain vision transformer, so it has no attention maps")
    return int(grid[0]), int(grid[1])


def _readers(model: nn.Module) -> slice:
    """Return the tokens that the classifier reads: the class token, which comes first, or the patches."""
    pool = getattr(model, "global_pool", None)
    if pool in ("cls", "token"):
        return slice(0, 1)
    if pool in ("seq", "avg"):
        return slice(int(getattr(model, "num_prefix_tokens", 0)), None)
    raise UserError(
        f"{type(model).__name__} pools its tokens by {pool!r}, for which attention maps are not defined; "
        "allowed: cls, token, seq, avg"
    )

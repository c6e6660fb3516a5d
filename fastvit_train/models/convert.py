"""Converts other implementations' state dicts to ours: the published compact family's and the upstream's."""

import math
import re
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvit_train.models.vit import ViT

StateDict = dict[str, Tensor]

# (pattern of their name, our name), tried in order; a pattern must match the whole name.
COMPACT_NAMES = [
    (r"tokenizer\.conv_layers\.(\d+)\.0\.(weight)", r"patch_embed.convs.\1.\2"),
    (r"classifier\.positional_emb", r"pos_embed"),
    (r"classifier\.class_emb", r"cls_token"),
    (r"classifier\.attention_pool\.(\w+)", r"attention_pool.\1"),
    (r"classifier\.norm\.(\w+)", r"norm.\1"),
    (r"classifier\.fc\.(\w+)", r"head.\1"),
    (r"classifier\.blocks\.(\d+)\.pre_norm\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"classifier\.blocks\.(\d+)\.self_attn\.(qkv|proj)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"classifier\.blocks\.(\d+)\.norm1\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"classifier\.blocks\.(\d+)\.linear([12])\.(\w+)", r"blocks.\1.mlp.fc\2.\3"),
]
COMPACT_PATCH_NAMES = [(r"tokenizer\.conv_layers\.0\.0\.(\w+)", r"patch_embed.proj.\1"), *COMPACT_NAMES]
UPSTREAM_NAMES = [
    (r"embedding\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embedding\.position_embeddings", r"pos_embed"),
    (r"embedding\.cls_token", r"cls_token"),
    (r"encoder\.blocks\.(\d+)\.layernorm_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.blocks\.(\d+)\.attention\.qkv_projection\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.blocks\.(\d+)\.attention\.output_projection\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.blocks\.(\d+)\.mlp\.dense_([12])\.(\w+)", r"blocks.\1.mlp.fc\2.\3"),
    (r"classifier\.(\w+)", r"head.\1"),
]
UPSTREAM_HEAD = re.compile(r"encoder\.blocks\.(\d+)\.attention\.heads\.(\d+)\.(query|key|value)\.(\w+)")


def checkpoint_filter_fn(state_dict: StateDict, model: ViT) -> StateDict:
    """Rename a state dict in any of the known layouts to our names, and resample its position embeddings.

    Unknown keys stay as they are, so that a strict load reports them.
    """
    if any(key.startswith("classifier.blocks.") for key in state_dict):
        patches = hasattr(model.patch_embed, "proj")
        state_dict = _rename(state_dict, COMPACT_PATCH_NAMES if patches else COMPACT_NAMES)
    elif any(key.startswith("encoder.blocks.") for key in state_dict):
        state_dict = _name_by_shape(_rename(_merge_heads(state_dict), UPSTREAM_NAMES), model)
    if "head.weight" in state_dict:
        # From this entry, timm decides whether the classifier fits the model. Only the file has the right number.
        pretrained_cfg(model)["num_classes"] = len(state_dict["head.weight"])
    return _fit_positions(state_dict, model)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model: its mean and std, the name of its classifier, and so on."""
    cfg = getattr(model, "pretrained_cfg", {})
    assert isinstance(cfg, dict)
    return cfg


def _rename(state_dict: StateDict, names: list[tuple[str, str]]) -> StateDict:
    def ours(key: str) -> str:
        for pattern, name in names:
            if match := re.fullmatch(pattern, key):
                return match.expand(name)
        return key

    return {ours(key): value for key, value in state_dict.items()}


def _merge_heads(state_dict: StateDict) -> StateDict:
    """Stack the per-head query, key and value layers into the merged layer: query heads, key heads, value heads."""
    parts: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    rest: StateDict = {}
    for key, value in state_dict.items():
        if match := UPSTREAM_HEAD.fullmatch(key):
            block, head, role, kind = match.groups()
            parts.setdefault((block, kind), {})[("query", "key", "value").index(role), int(head)] = value
        else:
            rest[key] = value
    merged = {
        f"encoder.blocks.{block}.attention.qkv_projection.{kind}": torch.cat([by_role[k] for k in sorted(by_role)])
        for (block, kind), by_role in parts.items()
    }
    return rest | merged


def _name_by_shape(state_dict: StateDict, model: ViT) -> StateDict:
    """Identify the pooling layer and the LayerNorm of the upstream's mc-ViT, whose names vary, by their shapes."""
    known = model.state_dict().keys()

    def ours(key: str, value: Tensor) -> str:
        kind = key.rpartition(".")[2]
        if key in known or kind not in ("weight", "bias"):
            return key
        if tuple(value.shape) in ((1, model.embed_dim), (1,)):
            return f"attention_pool.{kind}"
        return f"norm.{kind}" if tuple(value.shape) == (model.embed_dim,) else key

    return {ours(key, value): value for key, value in state_dict.items()}


def _fit_positions(state_dict: StateDict, model: ViT) -> StateDict:
    positions = state_dict.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[1] == model.pos_embed.shape[1]:
        return state_dict
    if math.isqrt(patches := positions.shape[1] - model.num_prefix_tokens) ** 2 != patches:
        return state_dict  # the model has other prefix tokens, which the strict load reports
    fitted = resample_abs_pos_embed(
        positions, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
    )
    return {**state_dict, "pos_embed": fitted}


def reset_head_if_other_classes(state_dict: StateDict, model: nn.Module) -> bool:
    """Replace the classifier in `state_dict`, in place, by that of `model` if their numbers of classes differ.

    Args:
        state_dict: weights to load.
        model: any timm model, with a newly initialized classifier.

    Returns:
        True if the classifier was replaced.
    """
    name = pretrained_cfg(model)["classifier"]
    weight = state_dict.get(f"{name}.weight")
    if weight is None or weight.shape == model.state_dict()[f"{name}.weight"].shape:
        return False
    state_dict |= {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] == name}
    return True

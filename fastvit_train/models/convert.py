"""Reads other implementations' state dicts into ours: the published compact family's and the seed's upstream."""

import math
import re
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvit_train.models.vit import ViT

StateDict = dict[str, Tensor]

# (pattern, ours), tried in order on the whole name.
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
SEED_NAMES = [
    (r"embedding\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embedding\.position_embeddings", r"pos_embed"),
    (r"embedding\.cls_token", r"cls_token"),
    (r"encoder\.blocks\.(\d+)\.layernorm_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.blocks\.(\d+)\.attention\.qkv_projection\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"encoder\.blocks\.(\d+)\.attention\.output_projection\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.blocks\.(\d+)\.mlp\.dense_([12])\.(\w+)", r"blocks.\1.mlp.fc\2.\3"),
    (r"classifier\.(\w+)", r"head.\1"),
]
SEED_HEAD = re.compile(r"encoder\.blocks\.(\d+)\.attention\.heads\.(\d+)\.(query|key|value)\.(\w+)")


def checkpoint_filter_fn(state_dict: StateDict, model: ViT) -> StateDict:
    """Rename a state dict to our names, whichever of the known layouts it has, and fit its positions.

    Keys that no layout knows stay as they are, so that a strict load names them.
    """
    if any(key.startswith("classifier.blocks.") for key in state_dict):
        patches = hasattr(model.patch_embed, "proj")
        state_dict = _rename(state_dict, COMPACT_PATCH_NAMES if patches else COMPACT_NAMES)
    elif any(key.startswith("encoder.blocks.") for key in state_dict):
        state_dict = _name_by_shape(_rename(_merge_heads(state_dict), SEED_NAMES), model)
    if "head.weight" in state_dict:
        # timm decides by this whether the classifier fits the model; only the file knows.
        pretrained_cfg(model)["num_classes"] = len(state_dict["head.weight"])
    return _fit_positions(state_dict, model)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's description of a model: its mean and std, its classifier's name, and so on."""
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
    """Stack the per-head query, key and value layers into the merged one: query heads, key heads, value heads."""
    parts: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    rest: StateDict = {}
    for key, value in state_dict.items():
        if match := SEED_HEAD.fullmatch(key):
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
    """The seed's mc-ViT adds a pooling layer and a LayerNorm under no settled names: tell them by their shapes."""
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
        return state_dict  # of a model with other prefix tokens: the strict load says so
    fitted = resample_abs_pos_embed(
        positions, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
    )
    return {**state_dict, "pos_embed": fitted}


def reset_head_if_other_classes(state_dict: StateDict, model: nn.Module) -> bool:
    """Drop a classifier of another number of classes from `state_dict`, in place; True where it did.

    `model` is any timm model; the fresh classifier it was built with stays.
    """
    name = pretrained_cfg(model)["classifier"]
    weight = state_dict.get(f"{name}.weight")
    if weight is None or weight.shape == model.state_dict()[f"{name}.weight"].shape:
        return False
    state_dict |= {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] == name}
    return True

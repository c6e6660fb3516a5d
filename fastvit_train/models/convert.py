"""Converts other implementations' state dicts to ours: the published compact family's and the upstream's."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvit_train.models.vit import ViT
from fastvit_train.runs.weights_file import shown

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


def fit_channels(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Adapt the weights of the first convolution to the model's number of channels, where one has 3 and the other 1.

    The filters for gray levels are the sums of those for red, green and blue, and the other way around each gets a
    third, so that the outputs for an input with three equal channels are the same.
    """
    own, fitted = model.state_dict(), {}
    for name in _names(model, "first_conv"):
        filters, wanted = state_dict.get(f"{name}.weight"), own.get(f"{name}.weight")
        if filters is not None and wanted is not None and {filters.shape[1], wanted.shape[1]} == {1, 3}:
            gray = filters.sum(1, keepdim=True) / wanted.shape[1]
            fitted[f"{name}.weight"] = gray.expand(-1, wanted.shape[1], *gray.shape[2:])
    return {**state_dict, **fitted}


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
    """Resample the position embeddings if they are for another grid of patches than the model's."""
    positions, grid = state_dict.get("pos_embed"), tuple(model.patch_embed.grid_size)
    if positions is None or positions.ndim != 3:
        return state_dict
    saved = _saved_grid(model, positions.shape[1] - model.num_prefix_tokens)
    if saved is None or saved == grid:  # if the model has other prefix tokens, then the strict load reports it
        return state_dict
    fitted = resample_abs_pos_embed(
        positions, new_size=list(grid), old_size=list(saved), num_prefix_tokens=model.num_prefix_tokens
    )
    return {**state_dict, "pos_embed": fitted}


def _saved_grid(model: ViT, patches: int) -> tuple[int, int] | None:
    """Return the rows and columns of patches in weights to load, as timm finds them; None if they are not known.

    A state dict does not hold them. They follow from the image size that timm recorded with the weights, or from the
    model's native size, if that gives the right number of patches; otherwise the images are taken to be square.
    """
    recorded = vars(model).get("pretrained_model_args", {}).get("img_size") or pretrained_cfg(model)["input_size"][-2:]
    height, width = (recorded, recorded) if isinstance(recorded, int) else recorded
    grid = model.patch_embed.grid((height, width))
    if grid[0] * grid[1] == patches:
        return grid
    side = math.isqrt(max(0, patches))
    return (side, side) if side**2 == patches else None


def convert_by_timm(state_dict: StateDict, model: nn.Module, rebuild: Callable[..., nn.Module]) -> StateDict:
    """Convert weights for one of timm's own models by timm's filter for it, which resamples position embeddings.

    Args:
        state_dict: the weights, with any number of classes.
        model: the model to load them into.
        rebuild: builds `model` again, with other options of `timm.create_model`.

    Returns:
        The converted weights, with the classifiers of `state_dict`.

    Raises:
        Exception: anything, if timm cannot load the weights into this model.
    """
    weights = [state_dict[key] for name in _names(model, "classifier") if (key := f"{name}.weight") in state_dict]
    num_classes = len(weights[0]) if weights else 0
    # Only the filter's own model calls it: timm has no function that returns it.
    overlay = {"state_dict": state_dict, "source": "", "num_classes": num_classes, "label_offset": 0}
    with torch.random.fork_rng(devices=[]):
        return rebuild(pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay).state_dict()


def _names(model: nn.Module, kind: Literal["classifier", "first_conv"]) -> tuple[str, ...]:
    """Return the names of the model's layers of a kind; a distilled model has two classifiers."""
    names = pretrained_cfg(model).get(kind) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def reset_heads_if_other_classes(state_dict: StateDict, model: nn.Module) -> bool:
    """Replace the classifiers in `state_dict`, in place, by those of `model` if their numbers of classes differ.

    Args:
        state_dict: weights to load.
        model: any timm model, with newly initialized classifiers.

    Returns:
        True if the classifiers were replaced.
    """
    names, own = _names(model, "classifier"), model.state_dict()
    weights = [f"{name}.weight" for name in names if f"{name}.weight" in own]
    fits = all(key in state_dict and len(state_dict[key]) == len(own[key]) for key in weights)
    if fits or not any(key in own for key in state_dict):
        return False
    for key in [key for key in (*state_dict, *own) if key.rpartition(".")[0] in names]:
        state_dict.pop(key, None)
        if key in own:
            state_dict[key] = own[key]
    return True


def misfit(state_dict: StateDict, model: nn.Module) -> str | None:
    """Say how the names and shapes of weights differ from those of `model`; None if they are the same."""
    own = model.state_dict()
    missing, unknown = [key for key in own if key not in state_dict], [key for key in state_dict if key not in own]
    if len(unknown) == len(state_dict):
        return f"its names begin with {_beginnings(state_dict)}, and the model's with {_beginnings(own)}"
    problems = [
        f"{key} is {_format_shape(state_dict[key])} in the file and {_format_shape(value)} in the model"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems = [shown(problems)] if problems else []
    problems += [f"the file does not have {shown(missing)}"] if missing else []
    problems += [f"the model does not have {shown(unknown)}"] if unknown else []
    return "; ".join(problems) or None


def _beginnings(names: Iterable[str]) -> str:
    return shown(list(dict.fromkeys(name.partition(".")[0] for name in names)))


def _format_shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"

"""Our models as timm entries: `timm.create_model(name)` works once fastvit_train is imported."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from fastvit_train.models.convert import checkpoint_filter_fn
from fastvit_train.models.vit import ViT

HALF = (0.5, 0.5, 0.5)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _cfg(mean: tuple[float, ...], std: tuple[float, ...], first_conv: str = "patch_embed.proj") -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": first_conv,
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        "c_vit_4_4_32.untrained": _cfg(HALF, HALF),
        "mc_vit_4_4_32.untrained": _cfg(HALF, HALF),
        "mc_vit_conv_4_4_32.untrained": _cfg(HALF, HALF),
        "vit_lite_7_4_32.untrained": _cfg(CIFAR10_MEAN, CIFAR10_STD),
        "cvt_7_4_32.untrained": _cfg(CIFAR10_MEAN, CIFAR10_STD),
        "cct_2_3x2_32.untrained": _cfg(CIFAR10_MEAN, CIFAR10_STD, "patch_embed.convs.0"),
        "cct_7_3x1_32.untrained": _cfg(CIFAR10_MEAN, CIFAR10_STD, "patch_embed.convs.0"),
    }
)

OUR_MODELS = sorted(name.partition(".")[0] for name in default_cfgs)

UPSTREAM = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4}
COMPACT = {
    "qkv_bias": False,
    "residual_norm": True,
    "gelu": "none",
    "init": "compact",
    "attn_drop_rate": 0.1,
    "drop_path_rate": 0.1,
}
COMPACT_2 = {**COMPACT, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}
COMPACT_7 = {**COMPACT, "embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}


def _create(name: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> ViT:
    if kwargs.pop("features_only", False):
        raise RuntimeError(f"features_only is not implemented for {name}; use forward_features")
    return build_model_with_cfg(
        ViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**defaults, **kwargs}
    )


@register_model
def c_vit_4_4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """The upstream's c-ViT: class token, no final LayerNorm; 119,098 parameters."""
    return _create("c_vit_4_4_32", pretrained, {**UPSTREAM, "pooling": "cls", "final_norm": False}, kwargs)


@register_model
def mc_vit_4_4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """The upstream's mc-ViT: sequence pooling; 119,147 parameters."""
    return _create("mc_vit_4_4_32", pretrained, {**UPSTREAM, "pooling": "seq"}, kwargs)


@register_model
def mc_vit_conv_4_4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """mc-ViT with positions by convolutions: 117,995 parameters."""
    return _create("mc_vit_conv_4_4_32", pretrained, {**UPSTREAM, "pooling": "seq", "pos_embed": "conv"}, kwargs)


@register_model
def vit_lite_7_4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-Lite-7/4: patches, class token; 3,716,874 parameters."""
    return _create("vit_lite_7_4_32", pretrained, {**COMPACT_7, "pooling": "cls"}, kwargs)


@register_model
def cvt_7_4_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """CVT-7/4: patches, sequence pooling; 3,716,619 parameters."""
    return _create("cvt_7_4_32", pretrained, {**COMPACT_7, "pooling": "seq"}, kwargs)


@register_model
def cct_2_3x2_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """CCT-2/3x2: two convolutions, sequence pooling; 283,723 parameters."""
    return _create("cct_2_3x2_32", pretrained, {**COMPACT_2, "pooling": "seq", "conv_layers": 2}, kwargs)


@register_model
def cct_7_3x1_32(pretrained: bool = False, **kwargs: Any) -> ViT:
    """CCT-7/3x1: one convolution, sequence pooling; 3,760,139 parameters."""
    return _create("cct_7_3x1_32", pretrained, {**COMPACT_7, "pooling": "seq", "conv_layers": 1}, kwargs)

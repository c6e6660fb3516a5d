"""The operator as a module that owns the merged parameters, and replacing a model's attention modules by it."""

from typing import Any

from torch import Tensor, nn

from fastvit_kernels.cpp.gelu import GELULinear
from fastvit_kernels.fused import split_projections
from fastvit_kernels.operator import attention
from fastvit_kernels.registry import AUTO, check_implementation
from fastvit_kernels.sdpa import attend

EXTRA_NAMES = {"rel_pos": "relative position", "relative_position": "relative position", "rope": "rotary position"}
"""names of attributes that show that an attention module computes more than the operator"""

LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` computes no more than its parameters say, so that a kernel can read them instead of calling it.

    It computes more if an adapter such as LoRA wraps it, if its weight is parametrized, if it has hooks, or if its
    `forward` was replaced.
    """
    kind = type(layer)
    known = kind in (nn.Linear, GELULinear) or f"{kind.__module__}.{kind.__name__}" in LAYER_NORMS
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return known and "forward" not in vars(layer) and not any(hooks)


class SelfAttention(nn.Module):
    """Multi-head self-attention with output projection.

    If `qkv` is not plain (see `is_plain`), it is called, and torch's scaled_dot_product_attention computes the rest,
    whatever the implementation: implementations read only the parameters of `qkv`.

    Args:
        qkv: projection from dim to 3*dim: query, key and value in that order, and within each, head after head.
        proj: projection of the concatenated heads, from dim.
        num_heads: number of heads; must divide dim.
        attn_drop: probability with which an attention weight is zeroed in training.
        proj_drop: dropout module applied after `proj`.
        implementation: a name from `implementations()`; all use the same parameters.

    Raises:
        ValueError: if num_heads does not divide dim, or if the implementation is unknown or cannot run here.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: nn.Module | None = None,
        implementation: str = AUTO,
    ) -> None:
        super().__init__()
        if num_heads < 1 or qkv.in_features % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {qkv.in_features}")
        check_implementation(implementation)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.implementation = implementation
        self.qkv = qkv
        self.proj = proj
        self.proj_drop = nn.Identity() if proj_drop is None else proj_drop

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map (batch, tokens, dim) to the same shape; the other arguments exist for timm and must stay unset."""
        if attn_mask is not None or is_causal:
            raise ValueError("this attention does not support masks: every token attends to every token")
        dropout_p = self.attn_drop if self.training else 0.0
        if is_plain(self.qkv):
            heads_BND = attention(
                x_BND,
                self.qkv.weight,
                self.qkv.bias,
                self.num_heads,
                dropout_p=dropout_p,
                implementation=self.implementation,
            )
        else:
            heads_BND = attend(*split_projections(self.qkv(x_BND), self.num_heads), dropout_p)
        return self.proj_drop(self.proj(heads_BND))


def swap_attention(model: nn.Module, implementation: str) -> None:
    """Make every attention module of `model` use `implementation`; timm's modules are replaced by `SelfAttention`.

    The replacement shares the parameters of timm's module under the same names; optimizers and checkpoints stay valid.

    Raises:
        ValueError: if the implementation is unknown or cannot run here, if `model` has no attention module, or if one
            of them computes something other than the operator. The model is then unchanged.
    """
    check_implementation(implementation)
    unsupported = unsupported_attentions(model)
    if unsupported:
        raise ValueError(f"attention {implementation!r} does not support {'; '.join(unsupported)}")
    if not can_swap_attention(model):
        raise ValueError(f"{type(model).__name__} has no attention module that {implementation!r} could replace")
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            module.implementation = implementation
        elif _is_timm_attention(module):
            model.set_submodule(name, _self_attention_of(module, implementation))


def can_swap_attention(model: nn.Module) -> bool:
    """Whether `model` has attention modules and `swap_attention` supports all of them."""
    modules = list(model.modules())
    return not unsupported_attentions(model) and any(
        isinstance(module, SelfAttention) or _is_timm_attention(module) for module in modules
    )


def unsupported_attentions(model: nn.Module) -> list[str]:
    """List the attention modules of `model` that compute something other than the operator, each with the reason."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        reason = _why_unsupported(module)
        if reason:
            names.setdefault(f"{type(module).__name__}: {reason}", []).append(name)
    return [f"{', '.join(where)} ({reason})" for reason, where in names.items()]


def _is_timm_attention(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Attention" and kind.__module__ in (
        "timm.layers.attention",
        "timm.models.vision_transformer",
    )


def _why_unsupported(module: Any) -> str | None:
    """Why `module`, if it is an attention module, differs from the operator; None if it does not."""
    if isinstance(module, SelfAttention):
        return None
    if not _is_timm_attention(module):
        is_attention = isinstance(module, nn.MultiheadAttention) or any(
            isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj", "in_proj")
        )
        if not is_attention:
            return None
        return next(
            (reason for part, reason in EXTRA_NAMES.items() if _has_name_like(module, part)),
            "not timm's plain attention",
        )
    extras = {
        "QK-norm": _is_active(module, "q_norm") or _is_active(module, "k_norm"),
        "a norm after the heads": _is_active(module, "norm"),
        "a gate": getattr(module, "gate", None) is not None,
        f"a {type(module.qkv).__name__} for qkv": type(module.qkv) is not nn.Linear,
        "heads wider than dim / num_heads": module.qkv.out_features != 3 * module.qkv.in_features,
    }
    return ", ".join(extra for extra, present in extras.items() if present) or None


def _has_name_like(module: nn.Module, part: str) -> bool:
    own = (*vars(module), *module._modules, *module._buffers, *module._parameters, type(module).__name__)
    return any(part in name.lower() for name in own)


def _is_active(module: nn.Module, name: str) -> bool:
    return not isinstance(getattr(module, name, nn.Identity()), nn.Identity)


def _self_attention_of(module: Any, implementation: str) -> SelfAttention:
    ours = SelfAttention(
        module.qkv, module.proj, module.num_heads, module.attn_drop.p, module.proj_drop, implementation
    )  # fmt: skip
    return ours.train(module.training)

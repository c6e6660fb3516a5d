"""The operator as a module that owns the merged parameters, and how it gets into a model."""

from typing import Any

from torch import Tensor, nn

from fastvit_kernels.operator import attention
from fastvit_kernels.registry import AUTO, check_implementation

SIGNS = {"rel_pos": "relative position", "relative_position": "relative position", "rope": "rotary position"}
"""what a name inside an attention module says that it computes"""


class SelfAttention(nn.Module):
    """Multi-head self-attention with output projection.

    Args:
        qkv: projection to query, key and value, (dim -> 3*dim), in that order, head after head in each.
        proj: projection of the concatenated heads, from dim.
        num_heads: heads; must divide dim.
        attn_drop: probability with which an attention weight is zeroed in training.
        proj_drop: applied after `proj`.
        implementation: a name from `implementations()`; the parameters are the same under each.

    Raises:
        ValueError: where num_heads does not divide dim, or the implementation is unknown or can't run here.
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
        """(batch, tokens, dim) to the same; the other arguments are those of timm's module, and must stay unset."""
        if attn_mask is not None or is_causal:
            raise ValueError("this attention takes no mask: every token attends to every token")
        heads_BND = attention(
            x_BND,
            self.qkv.weight,
            self.qkv.bias,
            self.num_heads,
            dropout_p=self.attn_drop if self.training else 0.0,
            implementation=self.implementation,
        )
        return self.proj_drop(self.proj(heads_BND))


def swap_attention(model: nn.Module, implementation: str) -> None:
    """Let every attention of `model` use `implementation` from now on: ours, and timm's, which ours replaces.

    A module of timm's is replaced by a `SelfAttention` that shares its parameters under the same names, so
    optimizers and checkpoints stay valid.

    Raises:
        ValueError: where the implementation is unknown or can't run here, or `model` has no attention that it
            serves, or one that it doesn't, naming it; the model is then as it was.
    """
    check_implementation(implementation)
    refused = unserved(model)
    if refused:
        raise ValueError(f"attention {implementation!r} can't serve {'; '.join(refused)}")
    if not swappable(model):
        raise ValueError(f"{type(model).__name__} has no attention that {implementation!r} could be put into")
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            module.implementation = implementation
        elif _is_timms(module):
            model.set_submodule(name, _ours(module, implementation))


def swappable(model: nn.Module) -> bool:
    """True where `swap_attention` can serve every attention of `model`, and there is one."""
    modules = list(model.modules())
    return not unserved(model) and any(isinstance(module, SelfAttention) or _is_timms(module) for module in modules)


def unserved(model: nn.Module) -> list[str]:
    """The attentions of `model` that the operator is not equal to, each with the reason."""
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        reason = _difference(module)
        if reason:
            names.setdefault(f"{type(module).__name__}: {reason}", []).append(name)
    return [f"{', '.join(where)} ({what})" for what, where in names.items()]


def _is_timms(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Attention" and kind.__module__ in (
        "timm.layers.attention",
        "timm.models.vision_transformer",
    )


def _difference(module: Any) -> str | None:
    """What `module` computes beyond the operator, if it is an attention that is neither ours nor timm's plain one."""
    if isinstance(module, SelfAttention):
        return None
    if not _is_timms(module):
        looks_like_one = isinstance(module, nn.MultiheadAttention) or any(
            isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj", "in_proj")
        )
        if not looks_like_one:
            return None
        return next(
            (what for sign, what in SIGNS.items() if _has_name_like(module, sign)), "not timm's plain attention"
        )
    extras = {
        "QK-norm": _does_something(module, "q_norm") or _does_something(module, "k_norm"),
        "a norm after the heads": _does_something(module, "norm"),
        "a gate": getattr(module, "gate", None) is not None,
        f"a {type(module.qkv).__name__} for qkv": type(module.qkv) is not nn.Linear,
        "heads wider than dim / num_heads": module.qkv.out_features != 3 * module.qkv.in_features,
    }
    found = [extra for extra, present in extras.items() if present]
    return ", ".join(found) or None


def _has_name_like(module: nn.Module, sign: str) -> bool:
    own = (*vars(module), *module._modules, *module._buffers, *module._parameters, type(module).__name__)
    return any(sign in name.lower() for name in own)


def _does_something(module: nn.Module, name: str) -> bool:
    return not isinstance(getattr(module, name, nn.Identity()), nn.Identity)


def _ours(module: Any, implementation: str) -> SelfAttention:
    ours = SelfAttention(
        module.qkv, module.proj, module.num_heads, module.attn_drop.p, module.proj_drop, implementation
    )  # fmt: skip
    return ours.train(module.training)

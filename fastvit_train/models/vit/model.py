"""One Vision Transformer for small images; its options cover the upstream's two models and the compact family.

Sources: ViT, Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929); sequence pooling and the
convolutional tokenizer, Hassani et al. 2021 (https://arxiv.org/abs/2104.05704); positions by convolutions, Chu et al.
2021 (https://arxiv.org/abs/2102.10882).

Shape suffixes: B batch, N tokens, D embed_dim, C image channels, H image height, W image width.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvit_kernels
from fastvit_train.models.vit.block import Block, Mlp
from fastvit_train.models.vit.positions import ConvPositions, sine_positions
from fastvit_train.models.vit.tokenizers import ConvTokenizer, PatchTokenizer

Size = int | tuple[int, int]


class ViT(nn.Module):
    """A Vision Transformer with timm's interface.

    Args:
        img_size: pixels, one number or (height, width); a multiple of patch_size if conv_layers is 0.
        in_chans: image channels.
        num_classes: outputs; 0 omits the classifier.
        pooling: "cls" prepends a class token and classifies on it; "seq" pools all tokens with learned
            weights (sequence pooling).
        global_pool: timm's name for the same; "" leaves the tokens unpooled for either `pooling`.
        patch_size: pixels; ignored if conv_layers > 0.
        conv_layers: number of convolutions of the tokenizer; 0 projects patches instead.
        kernel_size: kernel size of those convolutions.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the encoder's sizes.
        residual_norm: apply the second LayerNorm to the residual stream itself (compact family).
        final_norm: apply a LayerNorm after the last block.
        gelu: "tanh" (the upstream's) or "none" (exact).
        pos_embed: "learned", "sine" (fixed), or "conv": before each block, a depthwise 3x3 convolution of the patches'
            tokens is added to them, and the model has no `pos_embed`.
        init: "upstream" draws all weights and positions from N(0, initializer_range); "compact" is the published
            family's: Kaiming for the tokenizer, positions with std 0.2, a class token of zeros.
        initializer_range: standard deviation of the initial weights.
        drop_rate: dropout on embeddings, projections and MLP outputs.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        attention: implementation, one of `fastvit_kernels.implementations()`.

    Raises:
        ValueError: if the sizes do not fit together, or if the attention is unknown.
    """

    def __init__(
        self,
        img_size: Size = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        pooling: Literal["cls", "seq"] = "cls",
        global_pool: str | None = None,
        patch_size: int = 4,
        conv_layers: int = 0,
        kernel_size: int = 3,
        embed_dim: int = 48,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        residual_norm: bool = False,
        final_norm: bool = True,
        gelu: Literal["tanh", "none"] = "tanh",
        pos_embed: Literal["learned", "sine", "conv"] = "learned",
        init: Literal["upstream", "compact"] = "upstream",
        initializer_range: float = 0.02,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        _check_choice("pooling", pooling, ("cls", "seq"))
        hidden_dim = round(embed_dim * mlp_ratio)
        if hidden_dim < 1:
            raise ValueError(
                f"mlp_ratio {mlp_ratio} gives an MLP of width {embed_dim} x {mlp_ratio}, which rounds to 0; raise it"
            )
        _check_choice("pos_embed", pos_embed, ("learned", "sine", "conv"))
        image_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.pooling = pooling
        self.global_pool = self._checked_pool(global_pool)
        self.num_prefix_tokens = 1 if pooling == "cls" else 0
        self.grad_checkpointing = False

        self.patch_embed: PatchTokenizer | ConvTokenizer = (
            ConvTokenizer(in_chans, embed_dim, image_size, kernel_size, conv_layers)
            if conv_layers
            else PatchTokenizer(in_chans, embed_dim, image_size, patch_size)
        )
        tokens = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1] + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pooling == "cls" else None
        self.pos_embed = None
        if pos_embed != "conv":
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=pos_embed == "learned")
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                fastvit_kernels.SelfAttention(
                    nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias),
                    nn.Linear(embed_dim, embed_dim),
                    num_heads,
                    attn_drop_rate,
                    nn.Dropout(drop_rate),
                    attention,
                ),
                Mlp(
                    embed_dim,
                    hidden_dim,
                    gelu,
                    hidden_drop=drop_rate if residual_norm else 0.0,
                    drop=drop_rate,
                ),
                drop_path_rate * (i / max(depth - 1, 1)),
                residual_norm,
            )
            for i in range(depth)
        )
        self.pos_convs = nn.ModuleList(
            ConvPositions(embed_dim, self.patch_embed.grid_size) for _ in range(depth if pos_embed == "conv" else 0)
        )
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()
        self.attention_pool = nn.Linear(embed_dim, 1) if pooling == "seq" else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights(init, initializer_range)

    def _init_weights(self, init: str, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if init == "compact":
            for module in self.patch_embed.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()  # the bias keeps torch's default initialization
                    nn.init.kaiming_normal_(module.weight)
        if self.pos_embed is not None and not self.pos_embed.requires_grad:
            self.pos_embed.data.copy_(sine_positions(*self.pos_embed.shape[1:]))
        elif self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.2 if init == "compact" else std)
        if self.cls_token is not None and init == "upstream":
            nn.init.trunc_normal_(self.cls_token, std=std)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to the last block's tokens (batch, tokens, embed_dim)."""
        x_BND = self.patch_embed(images_BCHW)
        if self.cls_token is not None:
            x_BND = torch.cat((self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND), dim=1)
        x_BND = self.pos_drop(x_BND if self.pos_embed is None else x_BND + self.pos_embed)
        for i, block in enumerate(self.blocks):
            if self.pos_convs:
                x_BND = self.pos_convs[i](x_BND)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
        return self.norm(x_BND)

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens to logits (batch, num_classes), or with `pre_logits` to the pooled features (batch, embed_dim).

        If global_pool is "", both keep the tokens: (batch, tokens, ...).
        """
        if self.global_pool == "":
            pooled_BD = x_BND
        elif self.attention_pool is None:
            pooled_BD = x_BND[:, 0]
        else:
            weights_BN1 = self.attention_pool(x_BND).softmax(1)
            pooled_BD = (weights_BN1.transpose(1, 2) @ x_BND).squeeze(1)
        return pooled_BD if pre_logits else self.head(pooled_BD)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one, on the model's device and in its dtype."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(next(self.parameters())) if num_classes else nn.Identity()

    def _checked_pool(self, global_pool: str | None) -> str:
        if global_pool not in (None, "", self.pooling):
            raise ValueError(
                f"global_pool {global_pool!r} is not available; allowed: {self.pooling!r}, or '' for no pooling"
            )
        return self.pooling if global_pool is None else global_pool

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups, for layer-wise learning rates."""
        blocks: str | list[tuple[str, Iterable[int] | None]] = [
            (r"^(?:blocks|pos_convs)\.(\d+)", None),
            (r"^norm|^attention_pool", (99999,)),
        ]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}")

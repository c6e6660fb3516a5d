"""A transformer block: attention and MLP with their norms and residual connections.

Shape suffixes: B batch, N tokens, D embed_dim.
"""

import torch
from torch import Tensor, nn

import fastvit_kernels


class DropPath(nn.Module):
    """Zero whole samples of a residual branch with probability `rate` (Huang et al. 2016), and scale the rest.

    The probability is a tensor, so that blocks that differ only in it share their compiled code.
    """

    keep_prob: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep_prob", torch.tensor(1 - rate), persistent=False)

    def kept(self, x: Tensor) -> Tensor:
        """Draw which samples of `x` are kept, (batch,)."""
        return torch.rand(x.shape[0], device=x.device) < self.keep_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.kept(x).view(-1, *[1] * (x.ndim - 1)) / self.keep_prob


class Mlp(nn.Module):
    """Two linear layers with a GELU in between; `hidden_drop` is the compact family's dropout after the GELU."""

    def __init__(self, dim: int, hidden_dim: int, gelu: str, hidden_drop: float, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = fastvit_kernels.GELULinear(hidden_dim, dim, gelu, hidden_drop)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP; with `residual_norm` the second norm is applied to the residual stream itself."""

    implementation = "torch"
    """how a block is computed, see `set_block`"""

    def __init__(
        self, dim: int, attn: fastvit_kernels.SelfAttention, mlp: Mlp, drop_path_rate: float, residual_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.residual_norm = residual_norm

    def forward(self, x_BND: Tensor) -> Tensor:
        if self.implementation == "cpp" and self._fits_kernel(x_BND):
            return self._by_kernel(x_BND)
        x_BND = x_BND + self.drop_path(self.attn(self.norm1(x_BND)))
        if self.implementation == "triton" and all(map(fastvit_kernels.is_plain, self.layers()[3:])):
            return self._residual_mlp(x_BND)
        normed_BND = self.norm2(x_BND)
        residual_BND = normed_BND if self.residual_norm else x_BND
        return residual_BND + self.drop_path(self.mlp(normed_BND))

    def layers(self) -> tuple[nn.Module, ...]:
        """The layers whose parameters the kernels read; those from the second norm on are the MLP's."""
        return (self.norm1, self.attn.qkv, self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2)

    def _fits_kernel(self, x_BND: Tensor) -> bool:
        """Whether the CPU kernel supports these tokens and layers; if not, the block is composed from operators."""
        return all(map(fastvit_kernels.is_plain, self.layers())) and not (
            fastvit_kernels.why_block_unsupported(x_BND, self.mlp.fc1.out_features, self.attn.num_heads)
        )

    def _by_kernel(self, x_BND: Tensor) -> Tensor:
        attn, dropout_p = self.attn, self.attn.attn_drop if self.training else 0.0
        settings = fastvit_kernels.BlockSettings(
            attn.num_heads, self.norm1.eps, self.norm2.eps, self.mlp.fc2.approximate, self.residual_norm, dropout_p
        )
        seed = fastvit_kernels.draw_seed() if dropout_p else None  # in the order of the operators' draws
        scales = self._scales(x_BND)
        return fastvit_kernels.transformer_block(
            x_BND, self._parameters_of_kernel(), settings, scales, seed, implementation="cpp"
        )

    def _scales(self, x_BND: Tensor) -> tuple[Tensor, Tensor] | None:
        """Draw the factors of both branches, (batch,) each; None without stochastic depth."""
        drop_path = self.drop_path
        if not isinstance(drop_path, DropPath) or not self.training:
            return None
        attention_B, mlp_B = drop_path.kept(x_BND), drop_path.kept(x_BND)
        return attention_B / drop_path.keep_prob, mlp_B / drop_path.keep_prob

    def _parameters_of_kernel(self) -> fastvit_kernels.BlockParameters:
        attn, mlp = self.attn, self.mlp
        return fastvit_kernels.BlockParameters(
            self.norm1.weight, self.norm1.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias,
            self.norm2.weight, self.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        )  # fmt: skip

    def _residual_mlp(self, x_BND: Tensor) -> Tensor:
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        return fastvit_kernels.residual_mlp(
            x_BND, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            eps=norm.eps, gelu=fc2.approximate, implementation="triton",
        )  # fmt: skip

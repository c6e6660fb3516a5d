"""Our Vision Transformer."""

from fastvit_train.models.vit.block import Block, Mlp
from fastvit_train.models.vit.model import ViT
from fastvit_train.models.vit.tokenizers import ConvTokenizer, PatchTokenizer

__all__ = ["Block", "ConvTokenizer", "Mlp", "PatchTokenizer", "ViT"]

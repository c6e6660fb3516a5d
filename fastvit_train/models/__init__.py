"""Models by name: importing this package registers ours with timm."""

from fastvit_kernels.cuda_graph import record_graph, side_by_side
from fastvit_kernels.muon import MuonStep, can_update, update_matrices
from fastvit_train.models.attention import check_attention, pick_attention, plain_attention, set_attention, warm_up
from fastvit_train.models.attention_maps import AttentionMaps, attention_maps, patch_filters, position_similarity
from fastvit_train.models.blocks import check_block, set_block
from fastvit_train.models.build import (
    build_model,
    check_model,
    check_timm_folder,
    native_input_size,
)
from fastvit_train.models.compiling import compile_model
from fastvit_train.models.convert import pretrained_cfg
from fastvit_train.models.registry import OUR_MODELS
from fastvit_train.models.vit import ViT
from fastvit_train.models.whitening import whiten_patches

__all__ = [
    "OUR_MODELS",
    "AttentionMaps",
    "MuonStep",
    "ViT",
    "attention_maps",
    "build_model",
    "can_update",
    "check_attention",
    "check_block",
    "check_model",
    "check_timm_folder",
    "compile_model",
    "native_input_size",
    "patch_filters",
    "pick_attention",
    "plain_attention",
    "position_similarity",
    "pretrained_cfg",
    "record_graph",
    "set_attention",
    "set_block",
    "side_by_side",
    "update_matrices",
    "warm_up",
    "whiten_patches",
]

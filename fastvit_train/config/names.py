"""Names for help, completion and error messages, in a module that does not import torch.

A test checks that they are the names of the models and the implementations.
"""

from fastvit_train.utils.errors import UserError, did_you_mean

MODELS = (
    "c_vit_4_4_32",
    "cct_2_3x2_32",
    "cct_7_3x1_32",
    "cvt_7_4_32",
    "mc_vit_4_4_32",
    "mc_vit_conv_4_4_32",
    "vit_lite_7_4_32",
)
"""our models"""
ATTENTIONS = ("naive", "fused", "sdpa", "compiled", "cpp", "triton", "auto", "timm")
"""what --attention takes: the implementations, auto, and timm, the attention that comes with a timm model"""


def check_attention_name(name: str) -> None:
    """Check an attention's name before torch is imported.

    Raises:
        UserError: if there is no attention of that name.
    """
    if name not in ATTENTIONS:
        hint = did_you_mean(name, ATTENTIONS)
        raise UserError(f"unknown attention implementation {name!r}{hint}; allowed: {', '.join(ATTENTIONS)}")

"""Which models the Hugging Face Hub has, and what to do without a network."""

import timm
from huggingface_hub import constants

HUB = "hf-hub:"


def needs_hub(source: str) -> bool:
    """Whether timm gets the weights of `source`, a name that `timm.create_model` takes, from the Hub."""
    if source.startswith(HUB):
        return source != HUB
    if not timm.is_model(source):
        return False
    try:
        cfg = timm.get_pretrained_cfg(source)
    except RuntimeError:  # there are no such weights of the model, which timm reports when it is built
        return False
    return cfg is not None and bool(cfg.hf_hub_id)


def unreachable_reason(source: str) -> str:
    """Say what to do about a model that is not in the cache if the Hub does not answer."""
    return (
        f"{constants.ENDPOINT} cannot be reached, and the model is not in the cache {constants.HF_HUB_CACHE}; "
        "check the network (HF_ENDPOINT names a mirror), or save the model on another machine with "
        f"`export {source} --to timm`, copy the folder, and give local-dir:FOLDER"
    )

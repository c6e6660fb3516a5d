"""The config.json that timm loads a model from. No other module imports a private name of timm."""

from pathlib import Path
from typing import Any

# timm's public save_for_hf also writes the weights, which training saves separately, because they may be sharded.
from timm.models._hub import save_config_for_hf
from torch import nn


def write_timm_config(model: nn.Module, path: Path, model_config: dict[str, Any], data_config: dict[str, Any]) -> None:
    """Write the config.json of a model that timm built.

    Args:
        model: built by `timm.create_model`.
        path: the file to write.
        model_config: entries of config.json, such as `label_names`.
        data_config: how the model's input is preprocessed, such as `input_size`, `mean` and `std`.

    Raises:
        OSError: if the file cannot be written.
    """
    save_config_for_hf(model, str(path), model_config, data_config=data_config)

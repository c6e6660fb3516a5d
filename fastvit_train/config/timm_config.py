"""The config.json that timm loads a model from. No other module imports a private name of timm."""

from pathlib import Path
from typing import Any

# timm's public save_for_hf also writes the weights, which training saves separately, because they may be sharded.
from timm.models._hub import save_config_for_hf
from torch import nn

TAG = "import_fastvit_train_first"
"""timm prints the tag of an architecture that it does not know; nothing else can tell its user what to do"""


def needs_import(model: nn.Module) -> bool:
    """Whether timm can build `model` only after `import fastvit_train`."""
    return type(model).__module__.partition(".")[0] == __name__.partition(".")[0]


def imports(model: nn.Module) -> str:
    """Return the line that a program needs before timm can open `model`."""
    return "import timm, fastvit_train" if needs_import(model) else "import timm"


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
    entries = dict(model_config.get("pretrained_cfg", {}))
    if needs_import(model):
        entries["architecture"] = f"{vars(model)['pretrained_cfg']['architecture']}.{TAG}"
    save_config_for_hf(model, str(path), {**model_config, "pretrained_cfg": entries}, data_config=data_config)

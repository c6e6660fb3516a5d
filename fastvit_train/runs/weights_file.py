"""Weights from a file that another trainer may have written: found inside whatever wraps them."""

import logging
import pickle
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger(__name__)

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema", "averaged_model"),
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "backbone", "weights", "params"),
)
"""names under which trainers save weights, as a nested dict or a prefix of names; a moving average comes first"""
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""names that torch adds to a name, at any place, for a module that it wraps"""
SETTINGS = (SimpleNamespace, "argparse.Namespace")
"""the settings that timm's and many other trainers save with the weights"""
NAMES_SHOWN = 4


def read_weights(path: Path, own: Collection[str]) -> dict[str, Tensor]:
    """Read the weights in a .pth, .pt, .ckpt or .safetensors file, without running code from it.

    Nested dicts and prefixes of names are removed, such as `state_dict`, `model.` (Lightning), `module.` (DDP) and
    `_orig_mod.` (torch.compile). The moving average of the weights is taken if there is one.

    Args:
        path: the file.
        own: the names in the state dict of the model to load.

    Raises:
        ValueError: if the file does not hold weights, or if it holds Python objects other than tensors and numbers.
        Exception: torch's reader can raise any exception for a damaged file.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of a state dict")
    modules = {name.partition(".")[0] for name in own}
    weights, prefix = _unwrap(_without_inner_wrappers(content), modules)
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        where = f"{prefix.rstrip('.')!r} in it" if prefix else "it"
        raise ValueError(f"{where} is not a dict of tensors: it holds {shown(weights) or 'nothing'}")
    return weights


def shown(names: Collection[object]) -> str:
    """List the first names, and how many more there are."""
    first = ", ".join(str(name) for name in list(names)[:NAMES_SHOWN])
    return f"{first} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else first


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # The warnings are about the file's format.
        with torch.serialization.safe_globals([SETTINGS]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        if not objects:  # torch's own message is a page about its defaults
            raise ValueError("it is damaged, or not a file that torch.save wrote") from None
        raise ValueError(
            f"it holds Python objects that could run code ({shown(objects)}); if you trust the file, save only its "
            "weights: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
        ) from None


def _without_inner_wrappers(content: dict[Any, Any]) -> dict[Any, Any]:
    """Remove torch's own wrappers from all names."""

    def plain(key: Any) -> Any:
        return ".".join(part for part in key.split(".") if part not in INSIDE) if isinstance(key, str) else key

    return {
        plain(key): _without_inner_wrappers(value) if isinstance(value, dict) else value
        for key, value in content.items()
    }


def _unwrap(content: dict[Any, Any], modules: Collection[str]) -> tuple[dict[Any, Any], str]:
    """Return what is inside of all wrappers, and their names; `modules` are the first parts of the model's names."""
    prefix = ""
    while (wrapper := _find_wrapper(content, modules)) is not None:
        prefix += f"{wrapper}."
        inner = _inside(content, wrapper)
        outside = {key: value for key, value in content.items() if key != wrapper and not _is_under(key, wrapper)}
        beside = {key: value for key, value in outside.items() if str(key).partition(".")[0] in modules}
        dropped = [key for key, value in outside.items() if isinstance(value, Tensor) and key not in beside]
        if dropped and "n_averaged" not in dropped:
            log.warning("only the weights under %r are loaded, without %s", prefix.rstrip("."), shown(dropped))
        content = {**beside, **inner}
    return content, prefix


def _find_wrapper(content: dict[Any, Any], modules: Collection[str]) -> str | None:
    for name in WRAPPERS:
        if name not in modules and _inside(content, name):
            return name
    firsts = {str(key).partition(".")[0] for key in content}
    common = firsts.pop() if len(firsts) == 1 else None
    return common if common is not None and common not in modules and _inside(content, common) else None


def _inside(content: dict[Any, Any], wrapper: str) -> dict[Any, Any]:
    """Return what `wrapper` holds; empty if there are no tensors in it."""
    nested = content.get(wrapper)
    if not isinstance(nested, dict):
        nested = {key.removeprefix(f"{wrapper}."): value for key, value in content.items() if _is_under(key, wrapper)}
    return nested if _holds_tensors(nested) else {}


def _holds_tensors(content: dict[Any, Any]) -> bool:
    return any(
        _holds_tensors(value) if isinstance(value, dict) else isinstance(value, Tensor) for value in content.values()
    )


def _is_under(key: Any, wrapper: str) -> bool:
    return isinstance(key, str) and key.startswith(f"{wrapper}.")

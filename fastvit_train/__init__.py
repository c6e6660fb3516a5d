"""Train small Vision Transformers from scratch on small images.

Our models are registered with timm once both packages are imported: `timm.create_model("mc_vit_4_4_32")`.
What the package offers is imported at its first use, so that the command line's help does not wait for torch.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastvit_train.utils.timm_hook import register_with_timm

if TYPE_CHECKING:
    from fastvit_train import models
    from fastvit_train.inference.evaluate import evaluate
    from fastvit_train.inference.trained_model import TrainedModel, load_run
    from fastvit_train.models.evaluator import Evaluation
    from fastvit_train.training.loop import train

__version__ = "0.2.0"
__all__ = ["Evaluation", "TrainedModel", "__version__", "evaluate", "load_run", "models", "train"]

_MODULES = {
    "Evaluation": "fastvit_train.models.evaluator",
    "TrainedModel": "fastvit_train.inference.trained_model",
    "evaluate": "fastvit_train.inference.evaluate",
    "load_run": "fastvit_train.inference.trained_model",
    "train": "fastvit_train.training.loop",
}
"""the module that defines each public name"""


def __getattr__(name: str) -> Any:
    if name == "models":
        return _import("fastvit_train.models")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import(_MODULES[name]), name)
    globals()[name] = value
    return value


def _import(module: str) -> ModuleType:
    from fastvit_train.distributed import env

    with env.only_valid():
        return importlib.import_module(module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()

"""Register our models with timm as soon as both packages are imported, in either order.

`import fastvit_train` must be fast, so it must not import timm itself. If timm is not imported yet, a finder on
`sys.meta_path` waits for it and imports `fastvit_train.models`, which registers them, right after timm.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "fastvit_train.models"


def register_with_timm() -> None:
    """Import our models now if timm is imported, or else as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module(MODELS)
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Finds timm through the other finders, and makes its loader register our models too."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(MODELS)

            # The loader stays timm's own, because inspect and importlib.resources ask it for sources and files.
            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

"""Train small Vision Transformers from scratch on small images.

Importing the package registers its models with timm: `timm.create_model("mc_vit_4_4_32")`.
"""

from fastvit_train import models

# After all modules are there: two of them are called as these functions are, and would take their names.
from fastvit_train.library import Evaluation, LoadedRun, evaluate, load_run, train

__version__ = "0.1.0"
__all__ = ["Evaluation", "LoadedRun", "__version__", "evaluate", "load_run", "models", "train"]

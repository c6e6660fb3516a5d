"""Train small Vision Transformers from scratch on small images.

Importing the package registers its models with timm: `timm.create_model("mc_vit_4_4_32")`.
"""

from fastvit_train import models
from fastvit_train.inference.evaluate import evaluate
from fastvit_train.inference.trained_model import TrainedModel, load_run
from fastvit_train.models.evaluator import Evaluation
from fastvit_train.training.loop import train

__version__ = "0.1.0"
__all__ = ["Evaluation", "TrainedModel", "__version__", "evaluate", "load_run", "models", "train"]

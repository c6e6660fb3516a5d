"""Train small Vision Transformers from scratch on small images.

Importing the package registers its models with timm: `timm.create_model("mc_vit_4_4_32")`.
"""

from fastvit_train import models

__version__ = "0.1.0"
__all__ = ["__version__", "models"]

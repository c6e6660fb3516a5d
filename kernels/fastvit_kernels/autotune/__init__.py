"""The `auto` implementation: the fastest on this machine for a shape and dtype, measured once and remembered."""

from fastvit_kernels.autotune.choice import Choice, Mode, preferred
from fastvit_kernels.autotune.chooser import auto_name, choose

__all__ = ["Choice", "Mode", "auto_name", "choose", "preferred"]

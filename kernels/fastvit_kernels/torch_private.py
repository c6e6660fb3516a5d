"""The private parts of torch that fastvit_kernels and bench use; no public function does the same."""

import ctypes
from contextlib import AbstractContextManager
from typing import Any

import torch


def load_cpp_library(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Compile C++ source with the compiler, the OpenMP flags and the disk cache of torch.compile, and load it.

    The public `torch.utils.cpp_extension.load_inline` needs ninja and compiles torch's headers too, which takes
    much longer.

    Raises:
        Exception: of several types, if the source cannot be compiled or the cache cannot be written.
    """
    from torch._inductor.codecache import CppCodeCache  # the import takes a second

    return CppCodeCache.load(source, extra_flags=flags)


def specialize_each_shape() -> AbstractContextManager[None]:
    """Within this context, torch.compile compiles a function again for each new shape, as often as needed.

    By default it gives up after eight shapes, and generalises to dynamic shapes from the second. The public argument
    `dynamic=False` of torch.compile does not lift the limit, and `recompile_limit` is missing in torch 2.9.
    """
    limits: dict[str, Any] = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, **limits)


def reset_compiler() -> None:
    """Forget everything that torch.compile compiled, and its counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def is_observed() -> bool:
    """Whether a context of this thread changes what operators do, such as counting or tracing them."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )

"""Kernels in C++, compiled on their first use with the compiler and the cache that torch.compile uses."""

import ctypes
import functools
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
# torch's own flags keep g++ from making vectors out of loops: the sources do it themselves.
FLAGS = ("-fno-strict-aliasing", "-Wno-psabi")


def unavailable() -> str | None:
    """Why nothing can be compiled for the CPU here, or None."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if _found(compiler, os.environ.get("PATH")):
        return None
    return f"needs a C++ compiler, and {compiler} is not to be found; install it, or set CXX"


@functools.cache
def _found(compiler: str, path: str | None) -> bool:
    return shutil.which(compiler, path=path) is not None


@functools.cache
def cpp_library(name: str, dtype: torch.dtype, **constants: int) -> ctypes.CDLL:
    """The source `name` beside this file, compiled for bfloat16 or float32 and with `constants` defined.

    Raises:
        ValueError: where it can't be compiled.
    """
    from torch._inductor.codecache import CppCodeCache  # takes a second to import

    constants = {"BFLOAT16": int(dtype == torch.bfloat16), **constants}
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    sources = (FOLDER / source for source in ("cpp_vectors.h", name))
    try:
        return CppCodeCache.load(defines + "".join(path.read_text() for path in sources), extra_flags=FLAGS)
    except Exception as error:  # a compiler too old, a header missing, a cache that can't be written: all say why
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} can't be compiled ({type(error).__name__}: {reason[:200]}); take fused") from error


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Of the tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())

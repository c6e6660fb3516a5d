"""Compile C++ kernels on their first use, with the compiler and the cache of torch.compile."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastvit_kernels import torch_private

FOLDER = Path(__file__).parent
# torch's own flags disable vectorisation of loops in g++; the sources use vectors explicitly.
FLAGS = ("-fno-strict-aliasing", "-Wno-psabi")


def why_unavailable() -> str | None:
    """Why these kernels cannot be compiled on this machine, or None if they can."""
    if sys.platform == "win32":
        return "is written for GCC and Clang, and torch compiles with MSVC on Windows"
    return why_without_compiler()


def why_without_compiler() -> str | None:
    """Why torch.compile cannot compile C++ on this machine, or None if it can."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    failure = _compiler_failure(compiler, os.environ.get("PATH"))
    return failure and f"needs a C++ compiler, and {compiler} {failure}, or set CXX"


@functools.cache
def _compiler_failure(compiler: str, path: str | None) -> str | None:
    """What is wrong with a compiler, and what to do about it, or None if it answers."""
    program = shutil.which(compiler, path=path)
    if program is None:
        return "was not found; install it"
    if sys.platform != "win32":  # cl answers to other options
        try:
            subprocess.run([program, "--version"], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"does not work ({error}); mend it"
    return None


@functools.cache
def cpp_library(names: tuple[str, ...], dtype: torch.dtype, **constants: int) -> ctypes.CDLL:
    """Compile the files `names`, next to this one, together, for bfloat16 or float32 and with `constants` defined.

    Raises:
        ValueError: if it cannot be compiled.
    """
    constants = {"BFLOAT16": int(dtype == torch.bfloat16), **constants}
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    sources = (FOLDER / source for source in ("vectors.h", *names))
    try:
        return torch_private.load_cpp_library(
            defines + "".join(path.read_text(encoding="utf-8") for path in sources), FLAGS
        )
    except Exception as error:  # of many types: an old compiler, a missing header, a cache that cannot be written
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{names[-1]} cannot be compiled ({type(error).__name__}: {reason[:200]}); "
            "mend that (CXX names the compiler), or use torch's operators"
        ) from error


def addresses(tensors: Iterable[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of the tensors' first elements; null for None and for an empty tensor."""
    pointers = [None if tensor is None or not tensor.numel() else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of the tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())

"""The GPU resources that the Triton kernels need, for every shape in use; no GPU is needed.

    python -m fastvit_kernels.resources [--json]

compiles the kernels ahead of time to machine code and prints the registers, spilled bytes and shared memory of each. A
kernel that spills is slower, and one that needs more shared memory than the GPU has does not start.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvit_kernels.triton_kernels import fused, fused_kernels, packed
from fastvit_kernels.triton_kernels.attention import max_tokens

MAX_SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""bytes of shared memory per program, by compute capability (CUDA C++ Programming Guide, table of specifications)"""
SHAPES = {
    "mc_vit_4_4_32": (64, 48, 4),
    "c_vit_4_4_32": (65, 48, 4),
    "cct_2_3x2_32": (64, 128, 2),
    "cvt_7_4_32": (64, 256, 4),
    "vit_lite_7_4_32": (65, 256, 4),
    "cct_7_3x1_32": (256, 256, 4),
    "vit_tiny_patch16_224": (197, 192, 3),
    "patches of 2 pixels": (256, 48, 4),
    "one wide head": (64, 64, 1),
    "two wide heads": (65, 64, 2),
    "two heads of 32": (64, 64, 2),
    "one token": (1, 8, 1),
    "odd sizes": (7, 24, 3),
    "heads of 16": (50, 96, 6),
    "heads of 24": (50, 96, 4),
}
"""(tokens, dim, heads)"""
DROPOUT_SHAPES = [name for name in SHAPES if "vit" in name or "cct" in name]
PARAMETERS = ("w_ptr", "bias_ptr", "dparameters_ptr")
"""arguments that are float32 under autocast, as in training"""
FUSED = ("fused.forward", "fused.backward_x", "fused.backward_weight")
PACKED = ("packed.forward", "packed.backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class KernelVariant(NamedTuple):
    """One kernel for one shape, dtype and compute capability."""

    shape: str
    kernel: str
    dtype: str
    capability: int
    dropout: bool


def variants() -> Iterator[KernelVariant]:
    """All kernels that the shapes in use need."""
    for shape, dtype, capability in itertools.product(SHAPES, DTYPES, MAX_SHARED_MEMORY):
        if SHAPES[shape][0] > max_tokens(MAX_SHARED_MEMORY[capability]):
            continue
        if dtype == "bf16" and capability < 80:
            continue
        kernels = FUSED if fused.fits(*SHAPES[shape], DTYPES[dtype]) else PACKED
        for kernel, dropout in itertools.product(kernels, (False, True) if shape in DROPOUT_SHAPES else (False,)):
            yield KernelVariant(shape, kernel, dtype, capability, dropout)


def compile_variant(variant: KernelVariant) -> dict[str, Any]:
    """Compile a kernel and return its row of the table: sizes in bytes, registers per thread."""
    kernel, arguments = _arguments(variant)
    warps = arguments.pop("num_warps")
    source = ASTSource(fn=kernel, **_signature(kernel.arg_names, arguments, variant.dtype))
    code = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options={"num_warps": warps})
    return {
        **variant._asdict(),
        "warps": warps,
        **_usage(code.asm["cubin"]),
        "shared": code.metadata.shared,
        "shared_limit": MAX_SHARED_MEMORY[variant.capability],
        "tensor_core_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync", code.asm["ptx"])),
    }


def _arguments(variant: KernelVariant) -> tuple[Any, dict[str, Any]]:
    """Return the kernel and the compile-time arguments that it is launched with."""
    tokens, dim, heads = SHAPES[variant.shape]
    dtype, dropout_p = DTYPES[variant.dtype], 0.1 if variant.dropout else 0.0
    module, _, name = variant.kernel.partition(".")
    if module == "fused":
        constants = fused.constants(tokens, dim, heads, True, dropout_p, dtype)
        return getattr(fused_kernels, f"{name}_kernel"), constants
    tiles = (packed.forward_tiles if name == "forward" else packed.backward_tiles)(tokens, dtype)
    constants = packed.constants(tokens, dim, heads, dropout_p, dtype, tiles)
    return getattr(packed, f"{name}_kernel"), constants


def _signature(names: list[str], constants: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the types that the launcher infers for contiguous torch tensors, which are aligned to 16 bytes.

    The launcher specialises on integers that are 1 or divisible by 16.
    """
    strides = {"b": constants["N"] * constants["D"], "n": constants["D"]}
    constants = constants | {name: 1 for name in names if name in ("stride_xd", "stride_od")}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "i64" if name == "seed_ptr" else "fp32" if name in PARAMETERS else dtype
            signature[name] = f"*{kind}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride") or name == "batch":
            signature[name] = "i32"
            if name != "batch" and strides[name[-1]] % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return {"signature": signature, "constexprs": constants, "attrs": attributes}


def _usage(cubin: bytes) -> dict[str, int]:
    """Read the registers and spilled bytes per thread from the machine code with cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, encoding="utf-8", check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump did not report registers: {text!r}")
    return {"registers": int(match[1]), "spilled": int(match[2])}


def main() -> None:
    """Print the table, or the rows as JSON."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("fastvit_kernels.resources: unset TRITON_INTERPRET; the interpreter does not produce machine code")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_variant, variants()))
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['shape']:<22} {row['kernel']:<22} {row['dtype']} sm_{row['capability']}"
            f"{' dropout' if row['dropout'] else '':<8} {row['warps']} warps {row['registers']:>3} registers "
            f"{row['spilled']:>5} spilled {row['shared']:>6} of {row['shared_limit']} shared"
        )


if __name__ == "__main__":
    main()

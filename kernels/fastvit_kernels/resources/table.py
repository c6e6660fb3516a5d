"""A row of the table: a kernel compiled ahead of time, and what its machine code shows."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvit_kernels.resources.chips import CHIPS
from fastvit_kernels.resources.estimate import microseconds, occupancy
from fastvit_kernels.resources.launches import launch, signature
from fastvit_kernels.resources.machine_code import read, work
from fastvit_kernels.resources.variants import KernelVariant


def table_row(variant: KernelVariant) -> dict[str, Any]:
    """Compile a kernel and return its row of the table."""
    kernel, constants, values, programs, trips, moved = launch(variant)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    dtype = "fp32" if variant.kernel.startswith("mlp") else variant.dtype
    source = ASTSource(fn=kernel, **signature(kernel.arg_names, constants, values, dtype))
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)
    chip, warps, shared = CHIPS[variant.capability], options["num_warps"], compiled.metadata.shared
    code = read(compiled.asm["cubin"])
    resident = occupancy(chip, code.registers, shared, warps)
    counts, weighted = work(code.instructions, trips)
    bound, bound_by = microseconds(chip, counts, warps, programs, moved)
    return {
        **variant._asdict(),
        "warps": warps,
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": shared,
        "shared_limit": chip.shared_limit,
        "occupancy": resident.share,
        "occupancy_limit": resident.limit,
        "work": counts,
        "loops": "counted" if weighted else "static",
        "programs": programs,
        "bytes": moved,
        "chip": chip.name,
        "min_microseconds": bound,
        "bound_by": bound_by,
    }

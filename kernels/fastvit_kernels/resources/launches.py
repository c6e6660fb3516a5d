"""How each kernel is launched for a batch of 256: its arguments, programs and loops, and the bytes that it moves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton

from fastvit_kernels.resources.chips import CHIPS
from fastvit_kernels.resources.variants import DTYPES, SHAPES, KernelVariant
from fastvit_kernels.triton_kernels import fused, fused_kernels, mlp, mlp_kernels, muon, packed
from fastvit_kernels.triton_kernels.parts import weight_gradient_groups

BATCH, LAYERS = 256, 4
TOKENS_MOVED = {
    "fused.forward": 2,
    "fused.backward_x": 3,
    "fused.backward_weight": 2,
    "packed.forward": 4,
    "packed.backward": 7,
    "mlp.forward": 2,
    "mlp.backward_x": 3,
    "mlp.backward_weight": 2,
}
"""tensors of (batch, tokens, dim) that a kernel reads and writes; packed projections are three"""
PARAMETERS = ("w_ptr", "bias_ptr", "dparameters_ptr")
"""arguments that are float32 under autocast, as in training"""


class Launch(NamedTuple):
    """A kernel with what it is launched with."""

    kernel: Any
    constants: dict[str, Any]
    """compile-time arguments and options"""
    values: dict[str, Any]
    """integers, by argument, and tuples of pointers"""
    programs: int
    trips: tuple[int, ...]
    """how often each loop of the source is executed, in its order"""
    moved: int
    """bytes"""


def launch(variant: KernelVariant) -> Launch:
    """Return how a kernel is launched."""
    module = variant.kernel.partition(".")[0]
    return {"fused": _fused, "packed": _packed, "mlp": _mlp, "muon": _muon}[module](variant)


def _fused(variant: KernelVariant) -> Launch:
    tokens, dim, heads = SHAPES[variant.shape]
    dtype, name = DTYPES[variant.dtype], variant.kernel.partition(".")[2]
    values = {"batch": BATCH}
    for letter in "xo":
        values |= {f"stride_{letter}b": tokens * dim, f"stride_{letter}n": dim, f"stride_{letter}d": 1}
    programs, trips, moved = BATCH, heads, TOKENS_MOVED[variant.kernel] * BATCH * tokens * dim * dtype.itemsize
    if name == "backward_weight":
        groups = weight_gradient_groups(BATCH, heads, CHIPS[variant.capability].multiprocessors)
        programs, trips = groups * heads, triton.cdiv(BATCH, groups)
        moved += groups * 3 * dim * (dim + 1) * 4
    constants = fused.constants(tokens, dim, heads, True, 0.1 if variant.dropout else 0.0, dtype)
    return Launch(getattr(fused_kernels, f"{name}_kernel"), constants, values, programs, (trips,), moved)


def _packed(variant: KernelVariant) -> Launch:
    tokens, dim, heads = SHAPES[variant.shape]
    dtype, name = DTYPES[variant.dtype], variant.kernel.partition(".")[2]
    tiles = (packed.forward_tiles if name == "forward" else packed.backward_tiles)(tokens, dtype)
    constants = packed.constants(tokens, dim, heads, 0.1 if variant.dropout else 0.0, dtype, tiles)
    blocks = triton.cdiv(tokens, tiles.block)
    programs, trips = (BATCH * heads * blocks, ()) if name == "forward" else (BATCH * heads, (blocks,))
    moved = TOKENS_MOVED[variant.kernel] * BATCH * tokens * dim * dtype.itemsize
    return Launch(getattr(packed, f"{name}_kernel"), constants, {}, programs, trips, moved)


def _mlp(variant: KernelVariant) -> Launch:
    """The hidden width is four times the dim; the tokens are float32, as under autocast."""
    tokens, dim, _ = SHAPES[variant.shape]
    hidden, rows, name = 4 * dim, BATCH * tokens, variant.kernel.partition(".")[2]
    block = mlp.FORWARD_TOKENS if name == "forward" else mlp.BACKWARD_TOKENS
    constants = mlp.constants(dim, hidden, "tanh", DTYPES[variant.dtype], block)
    programs, trips = triton.cdiv(rows, constants["BLOCK_M"]), triton.cdiv(hidden, constants["BLOCK_H"])
    moved = TOKENS_MOVED[variant.kernel] * rows * dim * 4
    if name == "backward_weight":
        groups = weight_gradient_groups(programs, trips, CHIPS[variant.capability].multiprocessors)
        moved += groups * (2 * hidden * dim + hidden + dim + trips * 2 * dim) * 4
        programs, trips = groups * trips, triton.cdiv(programs, groups)
    return Launch(getattr(mlp_kernels, f"{name}_kernel"), constants, {"rows": rows}, programs, (trips,), moved)


def _muon(variant: KernelVariant) -> Launch:
    """The matrices of all layers but those for query, key and value."""
    dim = SHAPES[variant.shape][1]
    shapes = ((dim, dim), (4 * dim, dim), (dim, 4 * dim)) * LAYERS
    constants = muon.constants(shapes, 1, True, (3.4445, -4.7750, 2.0315), 5)
    tiles = triton.cdiv(constants["MAX_LONG"], constants["L_TILE"])
    pointers = dict.fromkeys(("weights", "gradients", "averages"), ("*fp32",) * len(shapes))
    moved = 5 * 4 * sum(rows * columns for rows, columns in shapes)
    no_scaler = {"grad_scale_ptr": None, "found_inf_ptr": None}
    return Launch(muon.muon_kernel, constants | no_scaler, pointers, len(shapes), (tiles, 5, tiles), moved)


def signature(names: list[str], constants: Mapping[str, Any], values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the types that the launcher infers for contiguous torch tensors, which are aligned to 16 bytes.

    The launcher specialises on integers that are 1 or divisible by 16.
    """
    ones = {name: 1 for name in names if values.get(name) == 1}
    types: dict[str, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for position, name in enumerate(names):
        value = values.get(name)
        if name in constants or name in ones:
            types[name] = "constexpr"
        elif isinstance(value, tuple):
            types[name] = value
            aligned += [(position, index) for index in range(len(value))]
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name == "seed_ptr" else f"*{'fp32' if name in PARAMETERS else dtype}"
            aligned.append((position,))
        elif value is not None:
            types[name] = "i32"
            aligned += [(position,)] if value % 16 == 0 else []
        else:
            types[name] = "fp32"
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    return {"signature": types, "constexprs": {**constants, **ones}, "attrs": attributes}

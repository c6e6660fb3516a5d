"""Theoretical occupancy, and a lower bound of a kernel's time, from its machine code."""

from collections.abc import Mapping
from typing import NamedTuple

from fastvit_kernels.resources.chips import REGISTERS, Chip

ASSUMPTION = (
    "Each time is a lower bound for a batch of 256: programs are spread evenly over the multiprocessors of the chip at "
    "its boost clock, latencies are hidden, the busiest unit never waits, no bank conflicts or cache misses occur, "
    "predicated instructions count as executed, and each tensor crosses the memory bus once."
)
WARP = 32
REGISTER_UNIT = 256
"""registers are allocated to a warp in this unit (CUDA Occupancy Calculator)"""
SCHEDULERS = 4
"""of a multiprocessor: each has its own registers, and issues one instruction per cycle"""
INTEGER_LANES, SPECIAL_LANES, MEMORY_LANES = 64, 16, 32
"""of a multiprocessor on all these chips; a memory lane is 4 bytes wide"""


class Occupancy(NamedTuple):
    """Resident programs per multiprocessor, what limits them, and the share of the possible warps that they are."""

    programs: int
    limit: str
    share: float


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> Occupancy:
    """Return the theoretical occupancy of a kernel.

    Args:
        chip: the GPU.
        registers: per thread.
        shared: bytes of shared memory per program.
        warps: per program.
    """
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS
    unit = 256 if chip.reserved == 0 else 128  # of allocation: on Turing, and since Ampere
    allocated = -(-(shared + chip.reserved) // unit) * unit
    limits = {
        "warps": chip.warps // warps,
        "programs": chip.programs,
        "registers": warps_by_registers // warps,
        "shared memory": chip.shared // allocated if allocated else chip.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit, limits[limit] * warps / chip.warps)


def microseconds(chip: Chip, work: Mapping[str, int], warps: int, programs: int, moved: int) -> tuple[float, str]:
    """Return a lower bound of a kernel's time in microseconds, and what it is bound by; see ASSUMPTION.

    Args:
        chip: the GPU.
        work: of a warp: instructions by pipe, `products` of the tensor cores and `transactions` of memory.
        warps: per program.
        programs: of the launch.
        moved: bytes that the launch reads and writes.
    """
    instructions = sum(count for name, count in work.items() if name not in ("products", "transactions"))
    cycles = {
        "tensor": work["products"] / chip.tensor_lanes,
        "fma": work["fma"] * WARP / chip.fp32_lanes,
        "memory": work["transactions"] * WARP / MEMORY_LANES,
        "special": work["special"] * WARP / SPECIAL_LANES,
        "integer": work["integer"] * WARP / INTEGER_LANES,
        "issue": instructions / SCHEDULERS,
    }
    per_multiprocessor = warps * -(-programs // chip.multiprocessors)
    times = {name: each * per_multiprocessor / chip.clock for name, each in cycles.items()}
    times["bandwidth"] = moved / chip.bandwidth / 1e3
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound

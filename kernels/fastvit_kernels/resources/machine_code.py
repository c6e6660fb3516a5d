"""What a kernel's machine code contains, as read by cuobjdump, which triton installs."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

PIPES = {
    "tensor": r"HG?MMA",
    "fma": r"FFMA|FMUL|FADD|FSWZADD|IMAD|HADD2|HFMA2|HMUL2|FHADD|FHFMA",
    "memory": r"LDG|LDGSTS|LDS|LDSM|LDL|LD|STG|STS|STSM|STL|ST|ATOM|ATOMG|ATOMS|RED|SHFL",
    "special": r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO",
    "integer": r"LOP3|SHF|LEA|I?ADD|IADD3|VIADD|ISETP|PRMT|SEL|FMNMX\d?|FSETP|FSEL|F2FP|SGXT|MOV|V?IMNMX\d?|BMSK",
}
"""Instructions by the unit that executes them, the first that matches.

fma: float32, packed 16-bit and integer multiply-adds. memory: global, shared and local memory, and shuffles, which take
the same way. special: exponentials, reciprocals and slow conversions. integer: also comparisons, selections and packing
to 16 bits. All others are control: branches, barriers, constants, and what is computed once per warp.
"""
TENSOR_CORE_PRODUCTS = {"1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16}
"""multiply-adds of a warp's HMMA by its shape"""


class Instruction(NamedTuple):
    """An instruction: its address, name and operands."""

    address: int
    name: str
    operands: str

    @property
    def pipe(self) -> str:
        """The unit that executes it, a key of PIPES or "control"."""
        opcode = self.name.partition(".")[0]
        return next((pipe for pipe, names in PIPES.items() if re.fullmatch(names, opcode)), "control")

    @property
    def transactions(self) -> int:
        """Accesses to 128 bytes of memory that it takes at least, for a warp."""
        if self.pipe != "memory":
            return 0
        if matrices := re.search(r"\.MT?88\.(\d)", self.name):
            return int(matrices[1])
        width = re.search(r"\.(64|128)\b", self.name)
        return int(width[1]) // 32 if width else 1

    @property
    def products(self) -> int:
        """Multiply-adds on the tensor cores, for a warp; those in TF32 count twice, because they take twice as long."""
        if self.pipe != "tensor":
            return 0
        _, shape, *suffixes = self.name.split(".")
        if "x" in shape:  # a group of four warps executes HGMMA together
            rows, columns, depth = map(int, shape.split("x"))
            count = rows * columns * depth // 4
        else:
            count = TENSOR_CORE_PRODUCTS[shape]
        return 2 * count if "TF32" in suffixes else count


class MachineCode(NamedTuple):
    """A kernel's registers and spilled bytes per thread, and its instructions."""

    registers: int
    spilled: int
    instructions: list[Instruction]


def read(cubin: bytes) -> MachineCode:
    """Disassemble a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-res-usage", "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    if usage is None or not lines:
        raise RuntimeError(f"cuobjdump reported no registers or no instructions: {text!r}")
    return MachineCode(int(usage[1]), int(usage[2]), [Instruction(int(address, 16), *rest) for address, *rest in lines])


def loops(instructions: Sequence[Instruction]) -> list[range]:
    """Return the addresses of each loop: a branch backwards, and all from its target on. Traps are not loops."""
    found = []
    for instruction in instructions:
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.startswith("BRA") else None
        if target and int(target[1], 16) < instruction.address:
            found.append(range(int(target[1], 16), instruction.address + 1))
    return sorted(found, key=lambda loop: loop.start)


def work(instructions: Sequence[Instruction], trips: Sequence[int]) -> tuple[dict[str, int], bool]:
    """Count what a warp executes: instructions by pipe, multiply-adds of the tensor cores, and memory transactions.

    Args:
        instructions: of a kernel.
        trips: how often each loop of the source is executed, in its order. None is within another.

    Returns:
        The counts, and whether loops are counted as often as they are executed. They are counted once if the compiler
        made others of the source's.
    """
    found, expected = loops(instructions), list(trips)
    if len(found) < len(trips):  # compilers drop a loop of one iteration if they know the number
        expected = [trip for trip in trips if trip > 1]
    nested = any(first.stop > second.start for first, second in itertools.pairwise(found))
    known = len(found) == len(expected) and not nested
    counts = dict.fromkeys((*PIPES, "control", "products", "transactions"), 0)
    for instruction in instructions:
        times = 1
        for loop, trip in zip(found, expected, strict=True) if known else ():
            if instruction.address in loop:
                times = trip
        counts[instruction.pipe] += times
        counts["products"] += times * instruction.products
        counts["transactions"] += times * instruction.transactions
    return counts, known

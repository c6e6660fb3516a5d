"""The implementations of the attention operator side by side: milliseconds per forward and backward pass.

    PYTHONPATH=kernels python -m bench.attention [results.json]

All of them in turn in every round, so that what slows the machine slows all alike; medians with quartiles; first
calls, in which compiling happens, outside the clock and apart. Prints Markdown.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastvit_kernels

SHAPES = {"B256 N64 D48 H4": (256, 64, 48, 4), "B64 N256 D256 H4": (64, 256, 256, 4)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 41
CALLS = {"cpu": 1, "cuda": 20}
"""between two synchronisations"""


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of every implementation that can run here: median, quartiles, and the first call."""
    batch, tokens, dim, heads = shape
    x = torch.randn(batch, tokens, dim, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(3 * dim, dim, device=device) * dim**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(3 * dim, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(batch, tokens, dim, dtype=dtype, device=device)

    def passes(name: str) -> Callable[[], None]:
        def run() -> None:
            output = fastvit_kernels.attention(x, weight, bias, heads, implementation=name)
            torch.autograd.grad(output, (x, weight, bias), upstream)

        return run

    names = [name for name, reason in fastvit_kernels.implementations().items() if reason is None]
    first = {name: milliseconds(passes(name), device, 1) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            times[name].append(milliseconds(passes(name), device, CALLS[device.type]))
    return {
        name: dict(zip(("q1", "median", "q3"), statistics.quantiles(values), strict=True), first_call=first[name])
        for name, values in times.items()
    }


def milliseconds(run: Callable[[], None], device: torch.device, calls: int) -> float:
    """Per call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls * 1e3


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": ROUNDS}


def processor() -> str:
    """The CPU's own name, with the instruction set that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    """Measure all cases, print the table, and write it to the file named on the command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": environment(device), "cases": {}}
    print(", ".join(f"{key} {value}" for key, value in results["environment"].items()), end="\n\n")
    for title, shape in SHAPES.items():
        for kind, dtype in DTYPES.items():
            rows = results["cases"][f"{title} {kind}"] = measure(shape, dtype, device)
            if len(results["cases"]) == 1:
                print(f"| ms, median (quartiles) | {' | '.join(rows)} |\n| {' | '.join(['---'] * (len(rows) + 1))} |")
            cells = (f"{row['median']:.1f} ({row['q1']:.1f}-{row['q3']:.1f})" for row in rows.values())
            print(f"| {title} {kind} | {' | '.join(cells)} |", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

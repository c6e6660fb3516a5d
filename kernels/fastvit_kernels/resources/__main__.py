"""Print what the Triton kernels need of a GPU, for every shape in use; no GPU is needed.

    python -m fastvit_kernels.resources [WORD ...] [--json]

compiles the kernels ahead of time to machine code and prints for each: registers and spilled bytes per thread, shared
memory, theoretical occupancy, instructions per pipe and warp, and a lower bound of its time at batch 256. A kernel that
spills is slower, and one that needs more shared memory than the GPU has does not start. Words such as mc_vit_4_4_32,
fused.forward, bf16, sm_90 or dropout select the kernels that have all of them.
"""

import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from fastvit_kernels.resources.estimate import ASSUMPTION
from fastvit_kernels.resources.table import table_row
from fastvit_kernels.resources.variants import variants

BROKEN_PIPE_STATUS = 141


def main() -> None:
    """Print the table, or the rows as JSON."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("fastvit_kernels.resources: unset TRITON_INTERPRET; the interpreter does not produce machine code")
    words = set(sys.argv[1:]) - {"--json"}
    selected = [variant for variant in variants() if words <= variant.words]
    if not selected:
        names = sorted(set().union(*(variant.words for variant in variants())))
        asked = " ".join(sorted(words))
        print(f"fastvit_kernels.resources: no kernel has all of: {asked}; words: {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        try:
            _print(pool.map(table_row, selected))
        except BrokenPipeError:  # the program that reads the output, such as head, has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports the pipe when it exits
            sys.exit(BROKEN_PIPE_STATUS)
        finally:
            pool.shutdown(cancel_futures=True)


def _print(rows: Iterable[dict[str, Any]]) -> None:
    if "--json" in sys.argv[1:]:
        print(json.dumps(list(rows)), flush=True)
        return
    print(ASSUMPTION)
    for each in rows:
        print(_line(each), flush=True)  # all rows together take half an hour


def _line(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in row["work"].items())
    return (
        f"{row['shape']:<20} {row['kernel']:<21} {row['dtype']} sm_{row['capability']}"
        f"{' dropout' if row['dropout'] else '':<8} {row['warps']} warps {row['registers']:>3} registers "
        f"{row['spilled']:>4} spilled {row['shared']:>6} of {row['shared_limit']} shared, occupancy "
        f"{row['occupancy']:.0%} ({row['occupancy_limit']}); per warp ({row['loops']} loops): {counts}; "
        f"{row['chip']}: at least {row['min_microseconds']:.1f} us ({row['bound_by']})"
    )


if __name__ == "__main__":
    main()

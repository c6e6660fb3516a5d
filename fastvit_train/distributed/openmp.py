"""How long idle OpenMP threads spin; must be set before torch is imported, so this module imports nothing heavy."""

import os
import sys

SPIN_COUNT = "GOMP_SPINCOUNT"
ROUNDS = 20_000
"""About a millisecond. See docs/troubleshooting.md for the speeds that were measured with other values."""


def limit_spinning() -> None:
    """Let an idle OpenMP thread give up its core after `ROUNDS` rounds of spinning, unless the user chose otherwise.

    By default, libgomp's threads spin for many milliseconds at the end of each parallel region. If another process
    needs a core, the thread that all wait for does not get it back until the spinning ones have used up their time, and
    training becomes several times slower than with one thread. Does nothing if torch has been imported: libgomp has
    read the variable then.
    """
    if "torch" not in sys.modules and not os.environ.keys() & {SPIN_COUNT, "OMP_WAIT_POLICY"}:
        os.environ[SPIN_COUNT] = str(ROUNDS)

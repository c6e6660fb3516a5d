#!/usr/bin/env bash
# Run the package bench.gpu_check with this machine's Python and the packages of this clone; bench/README.md describes it.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=$(command -v python3 || command -v python) || { echo "gpu_check: error: there is no python3 on PATH" >&2; exit 2; }
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench.gpu_check "$@"

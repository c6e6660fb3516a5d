#!/usr/bin/env bash
# Build the sdist and the wheel, check their metadata, and train with the installed wheel outside of the clone.
# An argument names a virtual environment that has the dependencies; the default is a new one, which downloads them.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
# shellcheck disable=SC1091
. "$venv/bin/activate"
unset PYTHONPATH
pip install --quiet build twine
python -m build --outdir "$work/dist" "$root"
twine check --strict "$work"/dist/*

pip install --quiet "$work"/dist/*.whl
pip install --quiet --force-reinstall --no-deps "$work"/dist/*.whl  # also where the clone is installed
cd "$work"
fastvit --version
python -c 'import fastvit_train, fastvit_kernels as kernels, sys
assert all(module.__file__.startswith(sys.prefix) for module in (fastvit_train, kernels)), "it is not the wheel"'
accelerate launch -m fastvit_train --epochs 1 --exp-name wheel
fastvit --epochs 1 --exp-name script
fastvit eval runs/script

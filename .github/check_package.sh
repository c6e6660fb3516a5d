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
python -c 'import fastvit_train, fastvit_kernels; print(fastvit_train.__file__, fastvit_kernels.__file__)'
accelerate launch -m fastvit_train --epochs 1 --exp-name wheel
fastvit eval runs/wheel

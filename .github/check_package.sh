#!/usr/bin/env bash
# Build the sdist and the wheel, check their metadata, and train with the installed wheel outside of the clone.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
unset PYTHONPATH
pip install --quiet build twine
python -m build --outdir "$work/dist" "$root"
twine check --strict "$work"/dist/*

pip install --quiet "$work"/dist/*.whl
cd "$work"
fastvit --version
python -c 'import fastvit_train, fastvit_kernels; print(fastvit_train.__file__, fastvit_kernels.__file__)'
accelerate launch -m fastvit_train --epochs 1 --exp-name wheel
fastvit eval runs/wheel

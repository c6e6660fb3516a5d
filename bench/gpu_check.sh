#!/usr/bin/env bash
# Everything that wants a GPU, in under ten minutes and without a network:
#
#     bench/gpu_check.sh OUT [IMAGES]
#
# OUT takes a JSON file per part; a part that has one is not done again, so a check that was cut short goes on where it
# was; remove a part's file to do it again. IMAGES is a folder of images to train on (train/CLASS/, test/CLASS/), for the time to an accuracy; left out
# without. PARTS="tests kernels steps accuracy" names the parts; ANY_DEVICE=1 tries the script without a GPU.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: bench/gpu_check.sh OUT [IMAGES]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
images=${2:+$(cd "$2" && pwd)} || exit 2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -z "${ANY_DEVICE:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no GPU that torch can use here; ANY_DEVICE=1 tries the script without one" >&2
    exit 2
fi

part() { # NAME SECONDS COMMAND...: a part that leaves OUT/NAME.json where it isn't there yet
    local name=$1 limit=$2
    shift 2
    case " ${PARTS:-tests kernels steps accuracy} " in *" $name "*) ;; *) return ;; esac
    if [ -s "$out/$name.json" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || { echo "   exit status $status; the end of $out/$name.log:" && tail -n 5 "$out/$name.log"; }
    python -m bench.gpu_table --collect "$name" "$status" "$out"
}

part tests 110 python -m pytest -m gpu -q -p no:cacheprovider
part kernels 150 python -m bench --only "attention operator" --seconds 0.3 --output "$out/kernels"
part steps 190 python -m bench --only "epoch" "training step, mc_vit" "training step, cct_7_3x1_32 B256, bf16" \
    --seconds 0.3 --output "$out/steps"
if [ -n "$images" ]; then
    part accuracy 120 python -m accelerate.commands.accelerate_cli launch --mixed_precision bf16 -m fastvit_train \
        --recipe fast-cifar10 --dataset folder --data-dir "$images" --runs-dir "$out/runs" --exp-name accuracy \
        --resume auto
fi
python -m bench.gpu_table "$out"

#!/usr/bin/env bash
# All checks and measurements that need a GPU, in under ten minutes and without a network:
#
#     bench/gpu_check.sh OUT [IMAGES]
#
# The script writes a JSON file per part to OUT. A part that has finished is not repeated, so an interrupted check
# continues with the part that was interrupted; delete the JSON file of a part to repeat it. IMAGES is a folder of images
# (train/CLASS/, test/CLASS/) for the time to an accuracy; without it, that part is skipped. Set
# PARTS="tests kernels steps epochs accuracy together" to select parts, and ANY_DEVICE=1 to test the script without a GPU,
# with ten times the time limit per part.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: bench/gpu_check.sh OUT [IMAGES]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
images=${2:+$(cd "$2" && pwd)} || exit 2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -z "${ANY_DEVICE:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no GPU is available to torch; set ANY_DEVICE=1 to test the script without one" >&2
    exit 2
fi

part() { # NAME SECONDS COMMAND...: run a part that writes OUT/NAME.json, unless it has finished already
    local name=$1 limit=$2${ANY_DEVICE:+0}
    shift 2
    case " ${PARTS:-tests kernels steps epochs accuracy together} " in *" $name "*) ;; *) return ;; esac
    if grep -qs '"exit_status": 0' "$out/$name.json"; then
        echo "== $name: already done"
        return
    fi
    echo "== $name (at most $limit s)"
    rm -rf "${out:?}/$name" "$out/$name.json"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || { echo "   exit status $status; the last lines of $out/$name.log:" && tail -n 5 "$out/$name.log"; }
    python -m bench.gpu_table --collect "$name" "$status" "$out"
}

bench() { # NAME SECONDS ROWS...
    part "$1" "$2" python -m bench --seconds 0.3 --output "$out/$1" --only "${@:3}"
}

narrow="B4096 N64 D48 H4, bf16" wide="B1024 N256 D256 H4, bf16"
part tests 100 python -m pytest -m gpu -q -p no:cacheprovider
bench kernels 110 "attention operator forward+backward, $narrow" "attention operator forward, $narrow" \
    "attention operator forward+backward, $wide" "attention operator forward, $wide"
bench steps 130 "training step, mc_vit_4_4_32 B256, bf16" "training step, mc_vit_4_4_32 B4096, bf16" \
    "training step, cvt_7_4_32 B256, bf16, fused" "training step, cct_7_3x1_32 B256, bf16, fused"
bench epochs 90 "epoch"
if [ -n "$images" ]; then
    train=(python -m accelerate.commands.accelerate_cli launch --mixed_precision bf16 -m fastvit_train
        --recipe fast-cifar10 --compile --dataset folder --data-dir "$images")
    part accuracy 90 "${train[@]}" --repeat 3 --target-accuracy 0.74 --runs-dir "$out/accuracy" --exp-name run
    together() { # three seeds at the same time on one GPU
        local seed pids=() status=0
        for seed in 0 1 2; do
            "${train[@]}" --seed "$seed" --runs-dir "$out/together" --exp-name "run-seed$seed" &
            pids+=($!)
        done
        for seed in "${pids[@]}"; do wait "$seed" || status=$?; done
        return $status
    }
    export -f together
    export out
    part together 60 bash -c "$(declare -p train); together"
fi
python -m bench.gpu_table "$out"

#!/usr/bin/env bash
# What weight and temperature of the distillation and the length of returns are worth, on Pong without a GPU.
usage='usage: results/ablation.sh [--out DIR] [--seeds SEED ...] [--workers N] [-- FLAG ...]

  distill_coef 1 at temperature 1, 32 at 1, 3 at 0.1, each with n_step 1 and 3; and the last of them in float32.
  Students of the bundled teacher: Nature CNNs in bfloat16, 10,000 updates offline and 40,000 steps online.
  Started again, it goes on. Then: python results/plot.py DIR --readme

  --out DIR         default: benchmark/ablation
  --seeds SEED ...  default: 1 2
  --workers N       runs at a time (default: half the cores)
  -- FLAG ...       flags of the program for every run'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=results/attended.sh
. "$root/results/attended.sh"
python=${PYTHON:-python} out=benchmark/ablation seeds=() workers=()
while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
        -h | --help) echo "$usage" && exit ;;
        --) break ;;
    esac
    if [ $# = 0 ]; then
        echo "error: $option: a value is missing, or there is no such option; see --help" >&2
        exit 2
    fi
    case $option in
        --out) out=$1 && shift ;;
        --workers) workers=(--workers "$1") && shift ;;
        --seeds) while [ $# -gt 0 ] && [[ $1 != -* ]]; do seeds+=("$1") && shift; done ;;
        *) echo "error: $option: no such option; see --help" >&2 && exit 2 ;;
    esac
done
if [ ${#seeds[@]} = 0 ]; then seeds=(1 2); fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

common=(--env-id PongNoFrameskip-v4 --teacher "$root/teachers/PongNoFrameskip-v4.cleanrl_model" --teacher-buffer "$out/buffer.pt" --save-model
    --network nature --teacher-steps 50000 --offline-steps 10000 --total-timesteps 40000 --learning-starts 5000 --buffer-size 100000
    --eval-frequency 20000)
settings=(
    "coef1_n1 --amp --distill-coef 1 --temperature 1.0 --n-step 1"
    "coef32_n1 --amp --distill-coef 32 --temperature 1.0 --n-step 1"
    "coef3sharp_n1 --amp --distill-coef 3 --temperature 0.1 --n-step 1"
    "coef1_n3 --amp --distill-coef 1 --temperature 1.0 --n-step 3"
    "coef32_n3 --amp --distill-coef 32 --temperature 1.0 --n-step 3"
    "coef3sharp_n3 --amp --distill-coef 3 --temperature 0.1 --n-step 3"
    "coef3sharp_n3_float32 --no-amp --distill-coef 3 --temperature 0.1 --n-step 3"
)
runs=()
for seed in "${seeds[@]}"; do
    for setting in "${settings[@]}"; do
        read -ra words <<<"$setting"
        run=$out/${words[0]}-PongNoFrameskip-v4-$seed
        mkdir -p "$run"
        printf '%s\n' "${common[@]}" --seed "$seed" "${words[@]:1}" "$@" >"$run/flags"
        runs+=("$run")
    done
done

grid() { attended "$python" "$root/results/grid.py" --log "$out/log.txt" "$@"; }
if [ ! -e "$out/buffer.pt" ]; then # one for all of them
    mkdir -p "$out/buffer"
    printf '%s\n' "${common[@]}" --seed 1 "$@" --offline-steps 1 --total-timesteps 0 --eval-episodes 1 >"$out/buffer/flags"
    grid --games 1 "$out/buffer"
fi
code=0
grid "${workers[@]}" "${runs[@]}" || code=$?
"$python" "$root/results/collect.py" "$out" --stage results "${runs[@]}"
exit "$code"

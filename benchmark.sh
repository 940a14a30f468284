#!/usr/bin/env bash
# Games × seeds × kinds of run, here or on a Slurm cluster; what is cut off is resumed when this is started again.
usage='usage: ./benchmark.sh [option ...] [-- FLAG ...]

  --env-ids ENV ...   default: PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4
  --seeds SEED ...    default: 1 2 3
  --kinds KIND ...    default: student    QDagger
                               scratch    DQN with the same network and as many online steps: --teacher none
                               kickstart  no offline phase: --offline-steps 0
                               offline    no online phase: --total-timesteps 0
  --program PROGRAM   torch (default), jax, or the path of a fork of one of them
  --workers N         runs at a time (default: one per GPU, without one per two cores)
  --games N           played by each final network (default: 30)
  --out DIR           default: benchmark; python tools/plot.py DIR draws it
  --slurm TEMPLATE    submit it as job arrays of this batch script: --slurm benchmark.slurm
  -- FLAG ...         flags of the program for every run: -- --total-timesteps 100000 --n-step 3

The teacher buffer of a game is made once, before the runs that share it. Exit code: that of tools/run.py.'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env_ids=(PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4) seeds=(1 2 3)
kinds=(student scratch kickstart offline) program=torch out=benchmark slurm='' extra=() grid=("$root/tools/run.py")

fail() { echo "error: $1" >&2 && exit 2; }
while [ $# -gt 0 ]; do
    option=$1 values=()
    shift
    while [ $# -gt 0 ] && { [ "$option" = -- ] || [[ $1 != -* ]]; }; do
        if [ -f "$1" ]; then values+=("$(realpath "$1")"); else values+=("$1"); fi # each run has a directory of its own
        shift
    done
    if [ "$option" = --help ]; then echo "$usage" && exit; fi
    [ ${#values[@]} -gt 0 ] || fail "$option: a value is missing, or there is no such option; see --help"
    case $option in
        --) extra=("${values[@]}") ;;
        --env-ids) env_ids=("${values[@]}") ;;
        --seeds) seeds=("${values[@]}") ;;
        --kinds) kinds=("${values[@]}") ;;
        --program) program=${values[0]} ;;
        --workers | --games) grid+=("$option" "${values[0]}") ;;
        --out) out=${values[0]} ;;
        --slurm) slurm=${values[0]} ;;
        *) fail "$option: no such option; see --help" ;;
    esac
done
if [ "$program" = torch ]; then program=$root/qdagger_dqn_atari_impalacnn.py; fi
if [ "$program" = jax ]; then program=$root/qdagger_dqn_atari_jax_impalacnn.py; fi
[ -f "$program" ] || fail "--program $program: there is no such file"
grid+=(--program "$program")

mkdir -p "$out/buffers" && out=$(cd "$out" && pwd) && rm -f "$out"/{buffers,runs}.txt
line() { printf '%q ' "$@" && echo; } # of a list for tools/run.py: a run's name and its flags
for env_id in "${env_ids[@]}"; do
    game=${env_id//\//-} # a name for files: ALE-Pong-v5
    common=(--env-id "$env_id" "${extra[@]}") buffer=(--teacher-buffer "$out/buffers/$game.pt")
    for kind in "${kinds[@]}"; do
        case $kind in
            student) flags=("${buffer[@]}") ;;
            scratch) flags=(--teacher none) ;;
            kickstart) flags=(--offline-steps 0) ;;
            offline) flags=("${buffer[@]}" --total-timesteps 0) ;;
            *) fail "--kinds $kind: none of student, scratch, kickstart, offline" ;;
        esac
        for seed in "${seeds[@]}"; do
            line "$kind-$game-$seed" "${common[@]}" "${flags[@]}" --seed "$seed" --save-model >>"$out/runs.txt"
        done
    done
    if grep -q "^student-$game\|^offline-$game" "$out/runs.txt"; then # then its buffer comes first
        flags=(--offline-steps 1 --total-timesteps 0 --eval-episodes 1)
        line "buffer-$game" "${common[@]}" "${buffer[@]}" "${flags[@]}" >>"$out/buffers.txt"
    fi
done
lists=("$out/runs.txt") after=()
if [ -e "$out/buffers.txt" ]; then lists=("$out/buffers.txt" "${lists[@]}"); fi
[ -n "$slurm" ] || exec "${PYTHON:-python}" "${grid[@]}" "${lists[@]}"
for list in "${lists[@]}"; do
    job=$(sbatch --parsable --chdir="$out" --array="1-$(wc -l <"$list")" "${after[@]}" "$slurm" "${grid[@]}" "$list")
    after=(--dependency="afterok:${job%%;*}")
    echo "$(wc -l <"$list") runs of $list: job ${job%%;*}"
done

#!/usr/bin/env bash
# Games × seeds × kinds of run, here or on a Slurm cluster; what is cut off is resumed when this is
# started again.
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
env_ids=(PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4)
seeds=(1 2 3)
kinds=(student scratch kickstart offline)
program=torch
out=benchmark
slurm=
extra=()
grid=("$root/tools/run.py")

fail() {
    echo "error: $1" >&2
    exit 2
}

# Read the command line.
while [ $# -gt 0 ]; do
    option=$1
    shift
    values=()
    while [ $# -gt 0 ]; do
        if [ "$option" != -- ] && [[ $1 == -* ]]; then
            break
        fi
        if [ -f "$1" ]; then # each run has a directory of its own
            values+=("$(realpath "$1")")
        else
            values+=("$1")
        fi
        shift
    done

    if [ "$option" = --help ]; then
        echo "$usage"
        exit
    fi
    if [ ${#values[@]} = 0 ]; then
        fail "$option: a value is missing, or there is no such option; see --help"
    fi
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

case $program in
    torch) program=$root/qdagger_dqn_atari_impalacnn.py ;;
    jax) program=$root/qdagger_dqn_atari_jax_impalacnn.py ;;
esac
if [ ! -f "$program" ]; then
    fail "--program $program: there is no such file"
fi
grid+=(--program "$program")

# Write the lists of runs, a run on each line: its name and its flags.
mkdir -p "$out/buffers"
out=$(cd "$out" && pwd)
runs=$out/runs.txt
buffers=$out/buffers.txt
rm -f "$runs" "$buffers"

line() {
    printf '%q ' "$@"
    echo
}

for env_id in "${env_ids[@]}"; do
    game=${env_id//\//-} # a name for files: ALE-Pong-v5
    common=(--env-id "$env_id" "${extra[@]}")
    buffer=(--teacher-buffer "$out/buffers/$game.pt")
    reads_buffer=
    for kind in "${kinds[@]}"; do
        case $kind in
            student)
                flags=("${buffer[@]}")
                reads_buffer=1
                ;;
            scratch) flags=(--teacher none) ;;
            kickstart) flags=(--offline-steps 0) ;;
            offline)
                flags=("${buffer[@]}" --total-timesteps 0)
                reads_buffer=1
                ;;
            *) fail "--kinds $kind: none of student, scratch, kickstart, offline" ;;
        esac
        for seed in "${seeds[@]}"; do
            flags_of_run=("${common[@]}" "${flags[@]}" --seed "$seed" --save-model)
            line "$kind-$game-$seed" "${flags_of_run[@]}" >>"$runs"
        done
    done
    if [ -n "$reads_buffer" ]; then # then it comes first
        flags=(--offline-steps 1 --total-timesteps 0 --eval-episodes 1)
        line "buffer-$game" "${common[@]}" "${buffer[@]}" "${flags[@]}" >>"$buffers"
    fi
done

lists=("$runs")
if [ -e "$buffers" ]; then
    lists=("$buffers" "$runs")
fi

# Train them here,
if [ -z "$slurm" ]; then
    exec "${PYTHON:-python}" "${grid[@]}" "${lists[@]}"
fi

# or as job arrays, of which the second begins when all tasks of the first have succeeded.
after=()
for list in "${lists[@]}"; do
    count=$(wc -l <"$list")
    options=(--parsable --chdir="$out" --array="1-$count" "${after[@]}")
    job=$(sbatch "${options[@]}" "$slurm" "${grid[@]}" "$list")
    job=${job%%;*}
    after=(--dependency="afterok:$job")
    echo "$count runs of $list: job $job"
done

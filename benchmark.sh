#!/usr/bin/env bash
# Games × seeds × kinds of run, here or on a Slurm cluster; what is cut off is resumed when this is
# started again.
usage='usage: ./benchmark.sh [option ...] [-- FLAG ...]

  --env-ids ENV ...   default: PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4
  --seeds SEED ...    default: 1 2 3
  --kinds KIND ...    default: student    QDagger
                               scratch    DQN with the same network and as many online steps:
                                          --teacher none
                               kickstart  no offline phase: --offline-steps 0
                               offline    no online phase: --total-timesteps 0
  --program PROGRAM   torch (default), jax, or the path of a fork of one of them
  --workers N         runs at a time (default: one per GPU, without one per two cores)
  --games N           played by each final network (default: 30)
  --out DIR           default: benchmark; python tools/plot.py DIR draws it
  --slurm TEMPLATE    submit it as job arrays of this batch script: --slurm benchmark.slurm
  -- FLAG ...         flags of the program for every run: -- --total-timesteps 100000 --n-step 3
                      The path of --teacher may be relative. In other flags it must be absolute:
                      each run has a directory of its own

The teacher buffer of a game is made once, before the runs that share it. A list of runs is called
DIR/runs.NUMBER.txt, where the number follows from what is in it: none is ever changed. Exit code:
that of tools/run.py.'
set -euo pipefail
unset CDPATH # with it cd may go elsewhere

# Only what bash 3.2 knows is used here: macOS has no other.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env_ids=(PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4)
seeds=(1 2 3)
kinds=(student scratch kickstart offline)
program=torch
out=benchmark
slurm=
grid=("$root/tools/run.py")

fail() {
    echo "error: $1" >&2
    exit 2
}

# The path of a file from everywhere; a word that names no file stays as it is.
absolute() {
    if [ -f "$1" ]; then
        echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
    else
        echo "$1"
    fi
}

# Read the options.
while [ $# -gt 0 ]; do
    option=$1
    shift
    if [ "$option" = -- ]; then
        break
    fi
    if [ "$option" = --help ]; then
        echo "$usage"
        exit
    fi
    if [ $# = 0 ] || [[ $1 == -* ]]; then
        fail "$option: a value is missing, or there is no such option; see --help"
    fi
    values=("$1")
    shift
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        values+=("$1")
        shift
    done

    case $option in
        --env-ids) env_ids=("${values[@]}") ;;
        --seeds) seeds=("${values[@]}") ;;
        --kinds) kinds=("${values[@]}") ;;
        --program) program=${values[0]} ;;
        --workers | --games) grid+=("$option" "${values[0]}") ;;
        --out) out=${values[0]} ;;
        --slurm) slurm=$(absolute "${values[0]}") ;;
        *) fail "$option: no such option; see --help" ;;
    esac
done

# What is left are flags of the program.
extra=()
previous=
for word in "$@"; do
    if [ "$previous" = --teacher ]; then
        word=$(absolute "$word")
    elif [[ $word == --teacher=* ]]; then
        word=--teacher=$(absolute "${word#*=}")
    fi
    extra+=("$word")
    previous=$word
done

case $program in
    torch) program=$root/qdagger_dqn_atari_impalacnn.py ;;
    jax) program=$root/qdagger_dqn_atari_jax_impalacnn.py ;;
esac
if [ ! -f "$program" ]; then
    fail "--program $program: there is no such file"
fi
grid+=(--program "$(absolute "$program")")

# Write the lists of runs, a run on each line: its name and its flags.
mkdir -p "$out/buffers"
out=$(cd "$out" && pwd)
runs=
buffers=

# Words that tools/run.py reads as they were. printf %q would do, but of bash 3.2 it writes é as
# $'\303\251'.
line() {
    local word
    for word in "$@"; do
        if [[ -z $word || $word == *[!A-Za-z0-9_./=:,+-]* ]]; then
            word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
        fi
        printf '%s ' "$word"
    done
}

for env_id in "${env_ids[@]}"; do
    game=${env_id//\//-} # a name for files: ALE-Pong-v5
    # Before bash 4.4 an empty array must not be expanded: hence the +.
    common=(--env-id "$env_id" ${extra[@]+"${extra[@]}"})
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
            runs+=$(line "$kind-$game-$seed" "${flags_of_run[@]}")$'\n'
        done
    done
    if [ -n "$reads_buffer" ]; then # then it is made first, by a run that leaves nothing else
        flags=(--offline-steps 1 --total-timesteps 0 --eval-episodes 1)
        flags+=(--no-save-model --no-upload-model --no-track --no-capture-video)
        buffers+=$(line "buffer-$game" "${common[@]}" "${buffer[@]}" "${flags[@]}")$'\n'
    fi
done

# A list is there as a whole, and is never changed: tasks of an earlier start that are still in
# Slurm's queue will read theirs.
write_list() {
    local name=$1 text=$2 number
    number=$(printf %s "$text" | cksum | cut -d ' ' -f 1)
    list=$out/$name.$number.txt
    printf %s "$text" >"$list.$$.part"
    mv "$list.$$.part" "$list"
}
write_list runs "$runs"
lists=("$list")
if [ -n "$buffers" ]; then
    write_list buffers "$buffers"
    lists=("$list" "${lists[@]}")
fi

# Train them here,
if [ -z "$slurm" ]; then
    exec "${PYTHON:-python}" "${grid[@]}" "${lists[@]}"
fi

# or as job arrays, of which the second begins when all tasks of the first have succeeded.
job=
for list in "${lists[@]}"; do
    count=$(grep -c "" "$list")
    options=(--parsable --chdir="$out" --array="1-$count")
    if [ -n "$job" ]; then
        options+=(--dependency="afterok:$job")
    fi
    job=$(sbatch "${options[@]}" "$slurm" "${grid[@]}" "$list")
    job=${job%%;*}
    echo "$count runs of $list: job $job"
done

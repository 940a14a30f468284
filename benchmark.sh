#!/usr/bin/env bash
# Games × seeds × kinds of run, on this machine or on a Slurm cluster; what is cut off goes on when this is started again.
usage='usage: ./benchmark.sh [option ...] [-- FLAG ...]

  --env-ids ENV ...   default: Pong, BeamRider, Breakout (PongNoFrameskip-v4 ...)
  --seeds SEED ...    default: 1 2 3
  --kinds KIND ...    default: student scratch kickstart offline
                        student    QDagger
                        scratch    DQN with the same network and as many online steps: --teacher none
                        kickstart  no offline phase: --offline-steps 0
                        offline    no online phase: --total-timesteps 0
  --workers N         runs at a time; default: what the memory of the GPUs allows, without one half the cores
  --out DIR           default: benchmark; runs, logs, and results.csv for results/plot.py
  --games N           played by each final network (default: 30)
  --slurm [OPTION ..] submit it to Slurm as a job array, with options of sbatch: --slurm --partition=gpu --time=24:00:00
  --gpus-per-task N   there (default: 1; 0 where the cluster has none)
  -- FLAG ...         flags of the program for every run: -- --total-timesteps 100000 --n-step 3

A teacher buffer is made once and shared by the seeds of a game. Exit code: 0 if every run is finished, 1 if some failed.'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=results/attended.sh
. "$root/results/attended.sh"
python=${PYTHON:-python}
env_ids=(PongNoFrameskip-v4 BeamRiderNoFrameskip-v4 BreakoutNoFrameskip-v4) seeds=(1 2 3)
kinds=(student scratch kickstart offline)
workers='' out=benchmark games=30 slurm='' sbatch=() gpus=1 task='' extra=()

fail() {
    echo "error: $1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
        -h | --help) echo "$usage" && exit ;;
        --) extra=("$@") && break ;;
        --slurm)
            slurm=1
            while [ $# -gt 0 ] && [ "$1" != -- ]; do sbatch+=("$1") && shift; done
            continue
            ;;
    esac
    values=()
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do values+=("$1") && shift; done
    [ ${#values[@]} -gt 0 ] || fail "$option: a value is missing, or there is no such option; see --help"
    case $option in
        --env-ids) env_ids=("${values[@]}") ;;
        --seeds) seeds=("${values[@]}") ;;
        --kinds) kinds=("${values[@]}") ;;
        --workers) workers=${values[0]} ;;
        --out) out=${values[0]} ;;
        --games) games=${values[0]} ;;
        --gpus-per-task) gpus=${values[0]} ;;
        --task) task=${values[0]} ;; # a line of DIR/runs, as Slurm runs it
        *) fail "$option: no such option; see --help" ;;
    esac
done
for number in "${workers:-1}" "$games" "$gpus" "${seeds[@]}" "${task:-0}"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "$number: not a number; --workers, --games, --gpus-per-task and --seeds take whole ones"
done
for kind in "${kinds[@]}"; do
    [[ " student scratch kickstart offline " == *" $kind "* ]] || fail "--kinds $kind: none of student, scratch, kickstart, offline"
done
mkdir -p "$out" || fail "--out $out: cannot be written"
out=$(cd "$out" && pwd)

grid() { attended "$python" "$root/results/grid.py" --games "$games" --log "$out/log.txt" ${workers:+--workers "$workers"} "$@"; }

if [ -n "$task" ]; then # one run, in a job of Slurm
    directory=$(sed -n "$((task + 1))p" "$out/runs")
    workers=1
    if [[ $directory == */buffer-* ]]; then games=1; fi
    code=0
    grid "$directory" || code=$?
    if [ "$asked" = USR1 ] && [ "$code" -gt 128 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # its time is over
    exit "$code"
fi

# plan DIRECTORY FLAG...: what is to run there. It is another benchmark if the flags are others.
plan() {
    mkdir -p "$1"
    if [ -e "$1/flags" ] && ! printf '%s\n' "${@:2}" | cmp -s - "$1/flags"; then
        fail "$1 was run with other flags; name another --out, or delete it"
    fi
    printf '%s\n' "${@:2}" >"$1/flags"
}

buffers=() runs=()
for env_id in "${env_ids[@]}"; do
    buffer=$out/buffers/$env_id.pt
    if [[ " ${kinds[*]} " == *" student "* || " ${kinds[*]} " == *" offline "* ]]; then
        mkdir -p "$out/buffers"
        plan "$out/buffer-$env_id" --env-id "$env_id" "${extra[@]}" --seed 1 --save-model --teacher-buffer "$buffer" \
            --offline-steps 1 --total-timesteps 0 --eval-episodes 1
        if [ ! -e "$buffer" ]; then buffers+=("$out/buffer-$env_id"); fi
    fi
    for seed in "${seeds[@]}"; do
        common=(--env-id "$env_id" "${extra[@]}" --seed "$seed" --save-model)
        for kind in "${kinds[@]}"; do
            case $kind in
                student) flags=(--teacher-buffer "$buffer") ;;
                scratch) flags=(--teacher none) ;;
                kickstart) flags=(--offline-steps 0) ;;
                offline) flags=(--teacher-buffer "$buffer" --total-timesteps 0) ;;
            esac
            plan "$out/$kind-$env_id-$seed" "${common[@]}" "${flags[@]}"
            runs+=("$out/$kind-$env_id-$seed")
        done
    done
done

if [ -n "$slurm" ]; then
    command -v sbatch >/dev/null || fail "--slurm: there is no sbatch on this machine"
    printf '%s\n' "${buffers[@]}" "${runs[@]}" | sed '/^$/d' >"$out/runs"
    first=${#buffers[@]} last=$((${#buffers[@]} + ${#runs[@]} - 1)) after=()
    common=(--parsable --requeue --signal=B:USR1@300 --chdir="$out" --output="$out/slurm-%A_%a.out" --open-mode=append)
    if [ "$gpus" != 0 ]; then common+=(--ntasks=1 --gpus-per-task="$gpus"); fi
    # shellcheck disable=SC2016 # Slurm's shell expands it
    printf -v wrapped 'exec bash %q --out %q --games %q --task $SLURM_ARRAY_TASK_ID' "$root/benchmark.sh" "$out" "$games"
    submit() { PYTHON=$(command -v "$python") sbatch "${common[@]}" "${sbatch[@]}" "$@" --wrap "$wrapped"; }
    if [ "$first" -gt 0 ]; then
        job=$(submit --job-name=teacher-buffers --array="0-$((first - 1))")
        echo "teacher buffers: job ${job%%;*}"
        after=(--dependency="afterok:${job%%;*}")
    fi
    job=$(submit --job-name=qdagger "${after[@]}" --array="$first-$last${workers:+%$workers}")
    echo "${#runs[@]} runs: job ${job%%;*}; logs in $out/*/log. When they are done: $python $root/results/collect.py $out --stage results $out/*-*-v4-*/"
    exit
fi

code=0
if [ ${#buffers[@]} -gt 0 ]; then games=1 grid "${buffers[@]}" || code=$?; fi
if [ "$code" -le 128 ]; then grid "${runs[@]}" || code=$?; fi
"$python" "$root/results/collect.py" "$out" --stage results "${runs[@]}"
exit "$code"

#!/usr/bin/env bash
# Every figure that wants a GPU, by one command, in the order of their worth.
usage='usage: results/reproduce.sh [--minutes N] [--out DIR] [--only STAGE ...] [option ...] [-- FLAG ...]

  check     the tests of what runs on a GPU (needs pytest)
  speed     steps per second and milliseconds per update, by variant
  teachers  Nature DQN, 10M steps
  students  the default run, from those teachers, or from the bundled one where it is the better
  controls  DQN from scratch with the student'"'"'s network; offline only

  --minutes N         stop before N minutes are over; a run in progress writes a checkpoint (default: no limit)
  --out DIR           few and small files, SUMMARY.md first (default: results/gpu); what they hold is not done again
  --work DIR          runs, checkpoints, teacher buffers: gigabytes (default: DIR.work)
  --only STAGE ...    these stages
  --env-ids ENV ...   default: Breakout, BeamRider, Pong
  --seeds SEED ...    of students and controls (default: 1 2 3)
  --workers N         runs at a time (default: 1)
  --against PATH      time this script of the same flags beside ours, with --python PATH
  --small             tiny numbers everywhere: tries the command itself
  -- FLAG ...         flags of the program for every training

Started again, it goes on where it stopped. Needs no network.'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=results/attended.sh
. "$root/results/attended.sh"
python=${PYTHON:-python}
began=$(date +%s)
margin=45 # seconds for checkpoints and the summary
minutes=0 out=$root/results/gpu work='' workers=1 small=''
stages=(check speed teachers students controls)
env_ids=(BreakoutNoFrameskip-v4 BeamRiderNoFrameskip-v4 PongNoFrameskip-v4)
seeds=(1 2 3) only=() against=() extra=() games=30

fail() {
    echo "error: $1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    option=$1
    shift
    values=()
    while [ "$option" != -- ] && [ $# -gt 0 ] && [[ $1 != -* ]]; do
        values+=("$1")
        shift
    done
    case $option in
        -h | --help) echo "$usage" && exit ;;
        --small) small=1 && continue ;;
        --) extra=("$@") && break ;;
    esac
    [ ${#values[@]} -gt 0 ] || fail "$option: a value is missing, or there is no such option; see --help"
    case $option in
        --minutes) minutes=${values[0]} ;;
        --out) out=${values[0]} ;;
        --work) work=${values[0]} ;;
        --only) only=("${values[@]}") ;;
        --env-ids) env_ids=("${values[@]}") ;;
        --seeds) seeds=("${values[@]}") ;;
        --workers) workers=${values[0]} ;;
        --against | --python) against+=("$option" "$(realpath -s "${values[0]}")") ;;
        *) fail "$option: no such option; see --help" ;;
    esac
done
for number in "$minutes" "$workers" "${seeds[@]}"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "$number: not a number; --minutes, --workers and --seeds take whole ones"
done
for stage in "${only[@]}"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || fail "--only $stage: no such stage; there are ${stages[*]}"
done
[ ${#only[@]} = 0 ] || stages=("${only[@]}")

# What the stages run with.
speed=("${against[@]}")
teacher=(--total-timesteps 10000000)
student=()
if [ -n "$small" ]; then
    games=1
    speed+=("--variants=--no-amp --network nature" --repeats 1 --teacher-steps 400 --offline-steps 400 --total-timesteps 800)
    teacher=(--total-timesteps 1200 --learning-starts 400 --buffer-size 5000 --eval-episodes 1)
    student=("${teacher[@]}" --network nature --teacher-steps 400 --offline-steps 100 --teacher-eval-episodes 1 --return-baseline random)
fi

mkdir -p "$out" && out=$(cd "$out" && pwd)
work=${work:-$out.work}
mkdir -p "$work/buffers" && work=$(cd "$work" && pwd)

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" | tee -a "$out/log.txt"; }
left() { if [ "$minutes" = 0 ]; then echo 100000000; else echo $((began + minutes * 60 - margin - $(date +%s))); fi; }
collect() { "$python" "$root/results/collect.py" "$out" "$@"; }
finished() { [ -e "$out/$1.csv" ] && grep -q "^$2,score/mean," "$out/$1.csv"; }

# limited COMMAND...: within what is left of the minutes; 124 if it was cut off.
limited() { attended timeout --kill-after=10 "$(left)" "$@"; }

# grid STAGE DIRECTORY...: train these runs within what is left of the minutes.
grid() {
    local stage=$1 code=0
    shift
    [ $# -gt 0 ] || return 0
    attended "$python" "$root/results/grid.py" --workers "$workers" --games "$games" --seconds "$(left)" \
        --log "$out/log.txt" "$@" || code=$?
    collect --stage "$stage" "$@"
    return "$code"
}

# plan DIRECTORY FLAG...: what grid.py is to run there.
plan() {
    mkdir -p "$1"
    printf '%s\n' "${@:2}" >"$1/flags"
}

check() {
    [ ! -e "$out/check.json" ] || return 0
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        say "check: there is no pytest, left out"
        return 0
    fi
    local code=0
    limited "$python" -m pytest -q -o addopts= -m gpu --rootdir "$root" "$root/tests" \
        --junitxml "$work/check.xml" >"$work/check.log" 2>&1 || code=$?
    say "check: $(tail -n 1 "$work/check.log")"
    [ "$code" -lt 2 ] || return "$code" # 1: tests failed, and that is a result
    collect --check "$work/check.xml"
}

speed() {
    [ ! -e "$out/speed.json" ] || return 0
    limited "$python" "$root/results/speed.py" --out "$work/speed.json" "${speed[@]}" >"$work/speed.log" 2>&1 ||
        { code=$? && say "speed: $(tail -n 1 "$work/speed.log")" && return "$code"; }
    mv "$work/speed.json" "$out/"
    say "speed: measured"
}

teachers() {
    local runs=() env_id
    for env_id in "${env_ids[@]}"; do
        finished teachers "teacher-$env_id-1" && continue
        plan "$work/teacher-$env_id-1" --env-id "$env_id" --teacher none --network nature --save-model --seed 1 \
            "${teacher[@]}" "${extra[@]}"
        runs+=("$work/teacher-$env_id-1")
    done
    grid teachers "${runs[@]}"
}

# better ENV: whether the teacher that was trained here plays better than the bundled one says on its card.
better() {
    local trained card
    trained=$(awk -F, -v run="teacher-$1-1" '$1 == run && $2 == "score/mean" { print $4 }' "$out/teachers.csv")
    card=$(sed -n 's/^| score | \(-\?[0-9.]*\) .*/\1/p' "$root/teachers/$1.md" 2>/dev/null || true)
    awk -v trained="$trained" -v card="${card:--1e9}" 'BEGIN { exit !(trained + 0 > card + 0) }'
}

# teacher_of ENV: the network that teaches there.
teacher_of() {
    local name=teacher-$1-1.cleanrl_model
    if finished teachers "teacher-$1-1" && better "$1" && "$python" -m zipfile -e "$out/weights.zip" "$work/weights" &&
        [ -e "$work/weights/$name" ]; then
        echo "$work/weights/$name"
    elif [ -e "$root/teachers/$1.cleanrl_model" ]; then
        echo "$root/teachers/$1.cleanrl_model"
    else
        return 1
    fi
}

# with_teacher STAGE KIND FLAG...: runs of all games and seeds, of which those of a game share the teacher's buffer.
with_teacher() {
    local stage=$1 kind=$2 seed env_id from code=0
    shift 2
    for seed in "${seeds[@]}"; do
        local runs=()
        for env_id in "${env_ids[@]}"; do
            local run=$work/$kind-$env_id-$seed
            finished "$stage" "$(basename "$run")" && continue
            if ! from=$(teacher_of "$env_id"); then
                say "$(basename "$run"): left out, since there is no teacher for it"
                continue
            fi
            plan "$run" --env-id "$env_id" --teacher "$from" --save-model --seed "$seed" \
                --teacher-buffer "$work/buffers/$(sha256sum "$from" | cut -c 1-8)-$env_id.pt" \
                "${student[@]}" "${extra[@]}" "$@"
            runs+=("$run")
        done
        grid "$stage" "${runs[@]}" || { code=$? && [ "$code" = 1 ] || return "$code"; }
    done
    return "$code"
}

controls() {
    local seed env_id code=0
    for seed in "${seeds[@]}"; do
        local runs=()
        for env_id in "${env_ids[@]}"; do
            local run=$work/scratch-$env_id-$seed
            finished controls "$(basename "$run")" && continue
            plan "$run" --env-id "$env_id" --save-model --seed "$seed" "${student[@]}" "${extra[@]}" --teacher none
            runs+=("$run")
        done
        grid controls "${runs[@]}" || { code=$? && [ "$code" = 1 ] || return "$code"; }
    done
    with_teacher controls offline --total-timesteps 0 || return
    return "$code"
}

failed=0
say "begins: ${stages[*]}"
for stage in "${stages[@]}"; do
    if [ -n "$asked" ] || [ "$(left)" -le 0 ]; then break; fi
    say "$stage"
    code=0
    case $stage in
        check) check || code=$? ;;
        speed) speed || code=$? ;;
        teachers) teachers || code=$? ;;
        students) with_teacher students student || code=$? ;;
        controls) controls || code=$? ;;
    esac
    collect
    case $code in
        0) ;;
        124 | 130 | 137 | 138 | 143) break ;; # cut off
        *) failed=1 ;;
    esac
done
collect
say "ends: $out/SUMMARY.md says what was measured"
exit "$failed"

#!/usr/bin/env bash
# All that is to be tried on a GPU, in one go; what comes of it is left in a folder:
#
#     tools/gpu.sh RESULTS [MINUTES] [OTHER]
#
# First the tests that need one, then speed, then as much of a default Breakout run as fits into
# MINUTES (unset: 8; 0: none). OTHER is another script to compare with, "PYTHON PATH/TO/SCRIPT.py".
# A step that fails does not keep the next from being tried; then the exit code is 1.
set -uo pipefail

results=$(mkdir -p "${1:?RESULTS}" && cd "$1" && pwd) || exit 2
minutes=${2:-8}
other=${3:-}
cd "$(dirname "$0")/.." || exit 2
repository=$PWD
python=${PYTHON:-python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

step() { # step NAME COMMAND ...: its output goes to NAME.txt, and is shown
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$results/$name.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        echo "== $name: exit code $code" | tee -a "$results/$name.txt"
        failed=1
    fi
}

# As long as MINUTES; SIGINT makes it write a checkpoint, which is not kept.
# shellcheck disable=SC2329 # called by `step`
breakout() {
    local code=0
    (
        cd "$scratch" &&
            timeout --signal=INT --kill-after=60 "${minutes}m" \
                "$python" "$repository/qdagger_dqn_atari_impalacnn.py" --save-model
    ) || code=$?
    if [ "$code" = 124 ] || [ "$code" = 130 ]; then
        code=0 # the time is up
    fi
    mkdir -p "$results/breakout"
    find "$scratch" \( -name 'events.*' -o -name '*.cleanrl_model' \) \
        -exec cp {} "$results/breakout/" \;
    return "$code"
}

step machine "$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
step tests timeout 300 "$python" -m pytest -m gpu -n 0 --durations=0

against=()
if [ -n "$other" ]; then
    against+=("--against=other script=$other")
fi
if "$python" -c "import jax" 2>/dev/null; then
    against+=("--against=JAX=$python qdagger_dqn_atari_jax_impalacnn.py")
fi
step speed timeout 1500 "$python" tools/speed.py --repeats "${REPEATS:-1}" \
    --out "$results/speed.json" ${against[@]+"${against[@]}"}

if [ "$minutes" != 0 ]; then
    step breakout breakout
fi
exit "$failed"

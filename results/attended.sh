# shellcheck shell=bash
# Sourced by benchmark.sh and reproduce.sh.

# shellcheck disable=SC2034 # for the scripts that source this
child='' asked='' news='' # process at work; the last request to stop; whether it has just come

hand_on() {
    asked=$1 news=1
    if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'hand_on TERM' INT TERM
trap 'hand_on USR1' USR1

# attended COMMAND...: run it, hand requests to stop on to it, and return its exit code.
attended() {
    local code=0
    news=
    "$@" &
    child=$!
    wait "$child" || code=$?
    while [ -n "$news" ]; do # it was a request that ended the wait, not the command
        news=
        code=0
        wait "$child" || code=$?
    done
    child=
    return "$code"
}

#!/usr/bin/env bash
# Rehearses a run on several machines: runs the program as N processes on this machine's CPU, each with K simulated
# devices (default 1). The GPUs of one machine do not need it, because one process drives them all.
#   launch/local_processes.sh 2 --devices=4 -- --config=configs/brain_tiny.py --workdir=runs/two
# Process 0 writes to the terminal, process I to process-I.log in the workdir (or in a temporary folder if there is no
# --workdir). SIGTERM and SIGINT are sent on to every process, which saves and stops. If a process dies, the others are
# ended, and the script exits with its status. In both cases the same command continues the run.
set -euo pipefail

refuse() {
    echo "local_processes.sh: $1" >&2
    exit 2
}

processes=${1:-}
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
    refuse "${processes:-nothing} is not a number of processes; write N [--devices=K] -- and the program's arguments."
shift
devices=1
if [[ ${1:-} == --devices=* ]]; then
    devices=${1#*=}
    [[ $devices =~ ^[1-9][0-9]*$ ]] || refuse "--devices=$devices is not a number of devices; give 1 or more."
    shift
fi
[[ ${1:-} == -- ]] || refuse "${1:-nothing} stands in the place of --; the program's arguments follow --."
shift

logs=
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --workdir=*) logs=${!i#*=} ;;
    --workdir) next=$((i + 1)) && logs=${!next:-} ;;
    esac
done
logs=${logs:-$(mktemp -d -t processes.XXXXXX)}
mkdir -p "$logs"

export JAX_PLATFORMS=cpu
eval "$("$(dirname "${BASH_SOURCE[0]}")/xla_flags.sh" cpu)"
export XLA_FLAGS="$XLA_FLAGS --xla_force_host_platform_device_count=$devices"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes

pids=() stopped=
forward() {
    stopped=$1
    kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

# Gives each process a group of its own. Then Ctrl-C reaches only this script, which sends it on once; without a group,
# background processes would ignore SIGINT.
set -m
for ((i = 0; i < processes; i++)); do
    if ((i == 0)); then
        JAX_PROCESS_ID=$i python -m unimed_jax.main "$@" </dev/null &
    else
        JAX_PROCESS_ID=$i python -m unimed_jax.main "$@" </dev/null >"$logs/process-$i.log" 2>&1 &
    fi
    pids[i]=$!
done
exec 3>&2 2>/dev/null # so that bash does not report a killed process in its own words
if [[ $stopped ]]; then forward "$stopped"; fi # the signal came before all processes had started

# Gives the other processes 15 seconds to notice or to finish a save, then kills them and all that they started.
end_others() {
    forward TERM
    for ((tenths = 0; tenths < 150; tenths++)); do
        kill -0 "${pids[@]}" || break
        sleep 0.1 || true
    done
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid" || true; done
}

result=0
while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}"; then continue; fi
        status=0
        wait "${pids[i]}" || status=$?
        unset "pids[i]"
        if ((status == 0)); then continue; fi
        result=$status
        if [[ $stopped && ($status == 143 || $status == 130) ]]; then continue; fi # stopped as asked
        # Others may have failed because one was killed; then the killed one is named as the cause.
        for j in "${!pids[@]}"; do
            if kill -0 "${pids[j]}"; then continue; fi
            other=0
            wait "${pids[j]}" || other=$?
            unset "pids[j]"
            if ((other > status && other > 128)); then i=$j status=$other; fi
        done
        end_others
        output="its output is above"
        if ((i > 0)); then
            output="its output is in $logs/process-$i.log"
            if ((status < 128)); then tail -n 1 "$logs/process-$i.log" >&3; fi # its last line
        fi
        if ((status != 2)); then # with status 2 the program itself has said what to correct
            echo "local_processes.sh: process $i of $processes died with status $status and the others were ended;" \
                "$output, and the same command continues from the last checkpoint." >&3
        fi
        exit "$status"
    done
    sleep 0.2 || true
done
exit "$result"

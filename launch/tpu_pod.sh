#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, started from a machine with gcloud (for TPU7x and later: k8s_jobset.yaml):
#   launch/tpu_pod.sh NAME ZONE --config=configs/cmoe.py --workdir=/shared/runs/cmoe
#   launch/tpu_pod.sh NAME ZONE stop
# The first command installs this repository's commit on the hosts if it is missing there, starts the run detached from
# this terminal, and shows the output of host 0. Ctrl-C ends only the display; the same command shows the output again
# or, if the run has stopped, continues it. The second command saves and stops.
# The workdir must be one folder that all hosts share: Filestore, or a bucket mounted with gcsfuse (with a hierarchical
# namespace, so that renaming a finished checkpoint is one operation). To mount it, use the ssh command below with
# --worker=all.
set -euo pipefail

refuse() {
    echo "tpu_pod.sh: $1" >&2
    exit 2
}

(($# >= 3)) || refuse "too few arguments; write NAME ZONE and the program's arguments, or NAME ZONE stop."
slice=$1 zone=$2
shift 2

on() { # HOSTS COMMAND
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker="$1" --command="$2"
}

# Files on a host: ~/unimed/COMMIT/{src,venv,installed}, and ~/unimed/{pid,log} of the run.
# shellcheck disable=SC2016 # the hosts expand these variables
alive='grep -qs unimed_jax.main /proc/$(cat ~/unimed/pid)/cmdline'
if [[ $* == stop ]]; then
    # shellcheck disable=SC2016
    on all "if $alive; then"' kill -TERM $(cat ~/unimed/pid); fi'
    exit
fi
[[ " $* " == *" --workdir=/"* ]] || refuse "--workdir=/FOLDER is missing; name a folder that all hosts share."

cd "$(dirname "${BASH_SOURCE[0]}")/.."
home=unimed/$(git rev-parse --short HEAD)
if ! on all "test -e $home/installed"; then
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$slice:unimed.tar.gz" --zone="$zone" --worker=all
    # uv, because the hosts' own Python may be older than 3.11.
    on all "set -e; mkdir -p $home/src; tar -xzf unimed.tar.gz -C $home/src
        curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL=\$HOME/unimed sh
        unimed/uv venv --quiet --clear --python 3.12 $home/venv
        unimed/uv pip install --quiet --python $home/venv './$home/src[tpu,demo]'
        touch $home/installed"
fi

program="../venv/bin/python -m unimed_jax.main $(printf '%q ' "$@")"
# shellcheck disable=SC2016
on all "cd $home/src || exit
if ! $alive; then
    eval \"\$(launch/xla_flags.sh tpu)\"
    JAX_NUM_PROCESSES=auto setsid $program </dev/null >>~/unimed/log 2>&1 &
    echo \$! >~/unimed/pid
fi"
# shellcheck disable=SC2016
on 0 'tail -n 50 -F --pid=$(cat ~/unimed/pid) ~/unimed/log'

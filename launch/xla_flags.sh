#!/usr/bin/env bash
# Prints what to export before a run on a platform: cpu, gpu, gpu-exact or tpu.
#   eval "$(launch/xla_flags.sh gpu)"
# An unknown flag ends jax at its first import, so a flag stays here only while jaxlib knows it and a reason is known;
# "compiled" below: ahead of time, without the card, with jaxlib 0.10.2 and 0.12.0.1 and libtpu 0.0.52.
# Flags of your own in XLA_FLAGS come last and win.
set -euo pipefail

flags=()
case "${1:-}" in
cpu)
    # Simulated devices share the cores and reach a collective far apart; after 40 s XLA would end the process.
    flags+=(--xla_cpu_collective_call_terminate_timeout_seconds=600)
    ;;
gpu | gpu-exact)
    # A training process is alone on its card: 75 % is the default, what remains at 90 % is for NCCL, cuDNN and CUDA.
    # (JAX reads it, not XLA, and refuses it beside its old name.)
    if [[ -z ${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
        echo "export XLA_CLIENT_MEM_FRACTION=0.9"
    fi
    # No flag for speed: the latency-hiding scheduler, the one usually named, compiled to the same program when set.
    # Pipelined collectives give other programs with more memory (208 -> 240 MiB); measure on your cards first.
    if [[ $1 == gpu-exact ]]; then
        # A continued run equals the unbroken one bit by bit: no atomic additions in scatters (the gradient of an
        # embedding becomes a sort: compiled), no choice of kernels by stopwatch. Costs speed.
        flags+=(--xla_gpu_deterministic_ops=true)
    fi
    ;;
tpu)
    # None: the flags usually given in LIBTPU_INIT_ARGS (async collective fusion, overlapped all-reduce for data
    # parallelism, the latency-hiding scheduler) are on already or compiled to the same program on v5e and v6e 4x4.
    ;;
*)
    echo "xla_flags.sh: ${1:+$1 }is no platform; give cpu, gpu, gpu-exact or tpu." >&2
    exit 2
    ;;
esac
if ((${#flags[@]})); then printf 'export XLA_FLAGS=%q\n' "${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"; fi

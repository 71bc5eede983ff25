#!/usr/bin/env bash
# Prints the environment variables to export before a run on a platform: cpu, gpu, gpu-exact or tpu.
#   eval "$(launch/xla_flags.sh gpu)"
# An unknown flag ends jax at its first import, so a flag stays here only as long as jaxlib knows it and it has a reason.
# "Compiled" below means compiled ahead of time, without the card, with jaxlib 0.10.2 and 0.12.0.1 and libtpu 0.0.52.
# Your own flags in XLA_FLAGS come last and override these.
set -euo pipefail

flags=()
case "${1:-}" in
cpu)
    # Simulated devices share the cores, so they may reach a collective long after each other; by default XLA ends the
    # process after 40 s of waiting.
    flags+=(--xla_cpu_collective_call_terminate_timeout_seconds=600)
    ;;
gpu | gpu-exact)
    # JAX takes 75 % of the card's memory by default. Nothing else runs on the card during training, so take 90 %; the
    # rest is for NCCL, cuDNN and CUDA. (JAX reads this variable, not XLA, and refuses it together with its old name.)
    if [[ -z ${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
        echo "export XLA_CLIENT_MEM_FRACTION=0.9"
    fi
    # There is no flag for speed: the one that is usually recommended, the latency-hiding scheduler, compiled to the
    # same program. Pipelined collectives compiled to a different program that needs more memory (208 -> 240 MiB);
    # measure on your cards before you set them.
    if [[ $1 == gpu-exact ]]; then
        # Makes a continued run equal to an uninterrupted one bit for bit: scatters do without atomic additions (the
        # gradient of an embedding becomes a sort: compiled), and kernels are not chosen by timing them. Slower.
        flags+=(--xla_gpu_deterministic_ops=true)
    fi
    ;;
tpu)
    # No flags: those usually set in LIBTPU_INIT_ARGS (async collective fusion, overlapped all-reduce for data
    # parallelism, the latency-hiding scheduler) are on by default or compiled to the same program on v5e and v6e 4x4.
    ;;
*)
    echo "xla_flags.sh: ${1:+$1 }is not a platform; give cpu, gpu, gpu-exact or tpu." >&2
    exit 2
    ;;
esac
if ((${#flags[@]})); then printf 'export XLA_FLAGS=%q\n' "${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"; fi

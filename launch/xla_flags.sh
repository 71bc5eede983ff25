#!/usr/bin/env bash
# Prints the environment variables to export before a run on a platform: cpu, gpu, gpu-exact,
# gpu-overlap or tpu.
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
gpu | gpu-exact | gpu-overlap)
    # JAX takes 75 % of the card's memory by default. Nothing else runs on the card during training, so take 90 %; the
    # rest is for NCCL, cuDNN and CUDA. (JAX reads this variable, not XLA, and refuses it together with its old name.)
    if [[ -z ${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
        echo "export XLA_CLIENT_MEM_FRACTION=0.9"
    fi
    # No flag for speed is set by default. On the full-size step, fsdp over 8 H100s (compiled; docs/speed.md), all 33
    # collectives overlap with products without any, and the latency-hiding scheduler, usually recommended, compiles to
    # the same program. XLA's dot merger is switched off where that helps, in the programs that decode
    # (unimed_jax/model/decoding.py); in training without it 1.4 % more bytes move.
    if [[ $1 == gpu-overlap ]]; then
        # For links so slow that a layer's weights take longer to come than the products they overlap with by default, as
        # between machines. Accepted and compiled, never timed: all together move 10 % more bytes in the card's memory
        # and need 0.4 GiB, so measure them against `gpu` on your cards.
        flags+=(
            # Each layer's weights are gathered while the layer before it runs, and gradients scattered while the next
            # one does.
            --xla_gpu_enable_pipelined_all_gather=true
            --xla_gpu_enable_pipelined_reduce_scatter=true
            --xla_gpu_enable_pipelined_all_reduce=true
            # Collectives are joined up to 512 MiB: half as many messages, each twice as large. Alone it changes nothing
            # else.
            --xla_gpu_all_gather_combine_threshold_bytes=536870912
            --xla_gpu_reduce_scatter_combine_threshold_bytes=536870912
            --xla_gpu_all_reduce_combine_threshold_bytes=536870912
        )
    fi
    if [[ $1 == gpu-exact ]]; then
        # Makes a continued run equal to an uninterrupted one bit for bit: scatters do without atomic additions (the
        # gradient of an embedding becomes a sort: compiled), and kernels are not chosen by timing them. Slower.
        flags+=(--xla_gpu_deterministic_ops=true)
    fi
    ;;
tpu)
    # No flags: those usually set in LIBTPU_INIT_ARGS (async collective fusion, overlapped all-reduce for data
    # parallelism, the latency-hiding scheduler) are on by default or compiled to the same program on v5e and v6e 4x4;
    # all of them together again on v5e 2x2 (a small model, fsdp 4).
    ;;
*)
    echo "xla_flags.sh: ${1:+$1 }is not a platform; give cpu, gpu, gpu-exact, gpu-overlap or tpu." >&2
    exit 2
    ;;
esac
if ((${#flags[@]})); then printf 'export XLA_FLAGS=%q\n' "${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"; fi

"""Reads what a run is planned for, such as v5e:16x16, and describes its devices to the compiler.

A topology is a chip of `chips.py` and a shape: A x B (x C) chips of a TPU slice, or a number of
GPUs; cpu:N are N simulated devices of this machine. The devices are described, not present. They
need the vendor's compiler: libtpu for TPUs, jax's CUDA plugin for GPUs.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from unimed_jax.errors import UserError, nearest
from unimed_jax.plan.chips import CHIPS, Chip, gpu_target

EXAMPLES = "v5e:4x4, v5p:2x2x2, h100:8 or cpu:8"
CUDNN = 91000  # 9.10, as jax's plugins of CUDA bring it
MOST = 8960  # devices, if their links set no bound


@dataclasses.dataclass(frozen=True)
class Topology:
    """Names the chips of a plan, and how they are laid out."""

    text: str
    shape: tuple[int, ...]
    chip: Chip | None  # None: simulated devices on this machine's CPU

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def machines(self) -> int:
        """Counts the machines over which GPUs are spread evenly; 1 for other devices."""
        on_gpu = self.chip is not None and self.chip.platform == "gpu"
        return math.ceil(self.count / self.chip.joined) if self.chip is not None and on_gpu else 1

    @property
    def platform(self) -> str:
        """Names the compiler: tpu, gpu or cpu."""
        return self.chip.platform if self.chip else "cpu"

    @property
    def usable(self) -> float:
        """Returns the bytes of a device's memory that a program may use."""
        if self.chip is not None:
            return self.chip.usable
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.count  # shared by all


def parse(text: str) -> Topology:
    """Reads CHIP:SHAPE; raises UserError for a chip or a shape that cannot be planned for."""
    name, colon, shape = text.partition(":")
    known = (*CHIPS, "cpu")
    if name not in known:
        raise UserError(
            f"--topology={text}: the chip {name!r} is unknown{nearest(name, known)} Choose from "
            f"{', '.join(known)}, with a shape: {EXAMPLES}."
        )
    chip = CHIPS.get(name)
    on_tpu = chip is not None and chip.platform == "tpu"
    number = "[1-9][0-9]{0,3}"
    form = f"{number}(x{number}){{1,2}}" if on_tpu else number
    numbers = tuple(map(int, shape.split("x"))) if re.fullmatch(form, shape) else ()
    wanted = "the sides of a slice joined by x" if on_tpu else "a number of devices"
    most = chip.joined if chip is not None and on_tpu else MOST
    if not numbers or math.prod(numbers) > most:
        raise UserError(
            f"--topology={text}: {shape!r} is not {wanted}, at most {most:,} in all; write it as "
            f"in {EXAMPLES}."
        )
    if name == "v5p" and len(numbers) != 3 or name in ("v5e", "v6e") and len(numbers) != 2:
        raise UserError(
            f"--topology={text}: a slice of {name} has {3 if name == 'v5p' else 2} sides; write it as "
            f"in {EXAMPLES}."
        )
    found = Topology(text, numbers, chip)
    if found.count % found.machines:
        assert chip is not None
        raise UserError(
            f"--topology={text}: a machine holds {chip.joined} of these GPUs, and {found.machines} "
            f"machines cannot share {found.count} evenly; choose a multiple of {chip.joined}."
        )
    return found


def check_compiler(topologies: Sequence[Topology]) -> None:
    """Raises UserError if this machine lacks a compiler that the topologies need."""
    for topology in topologies:
        if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={topology.text}: compiling for TPUs needs libtpu, which is not installed; "
                "pip install libtpu (no TPU is needed)."
            )
        if topology.platform == "gpu" and not _has_cuda_plugin():
            raise UserError(
                f"--topology={topology.text}: compiling for NVIDIA GPUs needs jax's CUDA plugin, which "
                "is not installed; pip install 'jax[cuda13]' (no GPU is needed)."
            )


def _has_cuda_plugin() -> bool:
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    try:
        return any(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # not even jax_plugins
        return False


def environment(topology: Topology) -> dict[str, str]:
    """Gives the environment variables under which a process compiles for a topology.

    They are read when jax starts, so each compilation has a process of its own.
    """
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if topology.platform == "cpu":
        ours["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.count}"
    elif topology.platform == "gpu":
        # Without a card no kernel can be timed, and Triton's need that to be chosen.
        ours["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    else:
        # libtpu reads XLA_FLAGS too, and an unknown one ends it. It must not ask for a TPU's host,
        # nor mind another process that compiles.
        ours |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        ours |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        ours |= {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    return ours


def devices(topology: Topology) -> list[Any]:
    """Describes the devices to jax, inside a process with the topology's `environment`.

    Raises UserError if the compiler does not know the shape or is held by another process.
    """
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    if chip is None:
        return jax.devices()
    try:
        if chip.gpu is None:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.text)
        else:
            # slices x machines x GPUs of a machine
            shape = f"1x{topology.machines}x{topology.count // topology.machines}"
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=chip.name,
                target_config=gpu_target(chip.gpu, chip),
                topology=shape,
            )
        return list(found.devices)
    except Exception as error:  # jax and the vendor's library raise many kinds
        raise UserError(refusal(topology, str(error))) from error


@contextlib.contextmanager
def as_on_the_card(topology: Topology) -> Iterator[None]:
    """Lets cuDNN's attention be traced for a GPU that is not here.

    JAX asks the card, and the cuDNN beside it, whether they can run it; inside the block the table
    of chips answers. If a release of JAX asks otherwise, config.model.attention="xla" still plans.
    """
    gpu = topology.chip.gpu if topology.chip else None
    if gpu is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def reaches(capability: str) -> bool:
        return gpu.capability >= tuple(map(int, capability.split(".")))

    def equals(capability: str) -> bool:
        return gpu.capability == tuple(map(int, capability.split(".")))

    answers: dict[str, Any] = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": reaches,
        "is_cuda_compute_capability_equal": equals,
    }
    before = {name: getattr(cudnn, name) for name in answers if hasattr(cudnn, name)}
    try:
        for name in before:
            setattr(cudnn, name, answers[name])
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)


def refusal(topology: Topology, reason: str) -> str:
    """Says in one sentence why the compiler did not take a topology, from its own words."""
    words = " ".join(reason.split())[:300].rstrip(".")
    if re.search("already in use|lockfile|multi-process lock", reason, re.IGNORECASE):
        return (
            f"--topology={topology.text}: libtpu is held by another process ({words}); end that one, or "
            "wait for it."
        )
    return (
        f"--topology={topology.text}: the compiler does not take this topology ({words}); choose a "
        f"shape that exists, as in {EXAMPLES}."
    )

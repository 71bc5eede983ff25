"""Lists the chips that a run can be planned for: their speed, memory and links, each with its source.

The numbers are those that the makers publish, for dense products in bfloat16; nothing is measured.
This is the only table of chips: `plan` and the benchmarks read it.
"""

import dataclasses
import functools
import re
from typing import Literal

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Describes an NVIDIA GPU to its compiler, which otherwise asks the card itself.

    Sizes in bytes; the values are those of NVIDIA's architecture papers and of CUDA's table of
    compute capabilities (docs.nvidia.com/cuda/cuda-c-programming-guide).
    """

    name: str  # as the driver calls it
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # GHz
    l2: int  # cache
    shared: int  # memory of a multiprocessor
    threads: int  # of a multiprocessor at once
    float32_units: int  # of a multiprocessor


@dataclasses.dataclass(frozen=True)
class Chip:
    """Holds what a chip can do in a second, and how much it holds."""

    name: str  # in a topology, as in v5e:4x4
    kind: str  # pattern of jax's name of the device, or of a part of it
    platform: Literal["tpu", "gpu"]
    flops: float  # dense bfloat16, a second
    memory: float  # bytes
    usable: float  # of them by a program; the runtime keeps the rest
    bandwidth: float  # of the memory, bytes a second
    link: float  # bytes a second that a chip sends to its neighbours, all links together
    source: str
    joined: int  # chips that these links join, at most
    beyond: float = 0.0  # bytes a second of a chip's adapter to the network between machines
    gpu: Gpu | None = None


TPU_PAGES = "cloud.google.com/tpu/docs/{}; both directions of its links halved"
# XLA's allocator is given 90 % of a card (launch/xla_flags.sh); NCCL, cuDNN and CUDA take of the rest.
OF_CARD = 0.9
INFINIBAND = (
    400e9 / 8
)  # one adapter a GPU (NVIDIA's DGX H100 and H200 data sheets); DGX A100: 200 Gbit/s
PCIE4 = 32 * GB  # x16, one direction


def _tpu(
    name: str,
    kind: str,
    flops: float,
    memory: float,
    usable: float,
    bandwidth: float,
    ici: float,
    pod: int,
) -> Chip:
    sizes = memory * GIB, usable * GIB
    page = TPU_PAGES.format(name)
    return Chip(name, kind, "tpu", flops, *sizes, bandwidth * GB, ici * GB / 2, page, pod)


def _gpu(
    name: str,
    kind: str,
    flops: float,
    memory: float,
    bandwidth: float,
    link: float,
    source: str,
    card: Gpu,
    joined: int = 8,
    beyond: float = 0.0,
) -> Chip:
    held = memory * GIB
    return Chip(
        name,
        kind,
        "gpu",
        flops,
        held,
        OF_CARD * held,
        bandwidth * GB,
        link,
        source,
        joined,
        beyond,
        card,
    )


_hopper = functools.partial(
    Gpu,
    capability=(9, 0),
    multiprocessors=132,
    clock=1.98,
    l2=50 << 20,
    shared=228 << 10,
    threads=2048,
    float32_units=128,
)
_ada = functools.partial(Gpu, capability=(8, 9), shared=100 << 10, threads=1536, float32_units=128)

# `usable` of TPUs is what their compiler says when a program does not fit. Memory of a card is what
# its driver reports, a little less than the round number of the data sheet.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", "v5 lite", 197e12, 16, 15.75, 819, 400, 256),
        _tpu("v5p", "v5p|v5$", 459e12, 95, 95.74, 2765, 1200, 8960),
        _tpu("v6e", "v6 lite", 918e12, 32, 31.25, 1638, 800, 256),
        _gpu(
            "h100", "H100 80GB HBM3", 989e12, 79.1, 3350, 450 * GB, "NVIDIA H100 data sheet, SXM",
            _hopper("NVIDIA H100 80GB HBM3"),
            beyond=INFINIBAND,
        ),
        _gpu(
            "h200", "H200$", 989e12, 139.8, 4800, 450 * GB, "NVIDIA H200 data sheet, SXM",
            _hopper("NVIDIA H200"),
            beyond=INFINIBAND,
        ),
        _gpu(
            "a100", "A100-SXM4-80GB", 312e12, 79.2, 2039, 300 * GB, "NVIDIA A100 data sheet, SXM 80 GB",
            Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 << 20, 164 << 10, 2048, 64),
            beyond=INFINIBAND / 2,
        ),
        _gpu(
            "l4", "L4", 121e12, 22.2, 300, PCIE4, "NVIDIA L4 data sheet, without sparsity",
            _ada("NVIDIA L4", multiprocessors=58, clock=2.04, l2=48 << 20),
        ),
        _gpu(
            "rtx4090", "RTX 4090$", 165e12, 23.5, 1008, PCIE4,
            "NVIDIA Ada architecture paper, float32 sums, without sparsity",
            _ada("NVIDIA GeForce RTX 4090", multiprocessors=128, clock=2.52, l2=72 << 20),
        ),
        _gpu(
            "a10", "A10", 125e12, 22.0, 600, PCIE4, "NVIDIA A10 data sheet, without sparsity",
            Gpu("NVIDIA A10", (8, 6), 72, 1.695, 6 << 20, 100 << 10, 1536, 128),
        ),
    )
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Finds the chip that jax calls `device_kind`; None if the table lacks it.

    An L4 is another card than an L40S, and an H100 for PCIe is slower than the one of the table.
    """
    for chip in CHIPS.values():
        if re.search(rf"(?<!\w)({chip.kind})(?!\w)", device_kind):
            return chip
    return None


def gpu_target(gpu: Gpu, chip: Chip) -> str:
    """Writes the description of a card that XLA's GPU compiler reads (a GpuTargetConfigProto)."""
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.shared,
        # a block may ask for all but what the system keeps
        "shared_memory_per_block_optin": gpu.shared - (1 << 10),
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.float32_units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "device_address_bits": 64,
        "name": f'"{gpu.name}"',
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} feature_extension: {feature} }}",
        "dnn_version": '"9.10.0"',
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
    }
    fields = "\n".join(
        f"  {key} {value}" if str(value).startswith("{") else f"  {key}: {value}"
        for key, value in info.items()
    )
    version = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
    return (
        f'gpu_device_info {{\n{fields}\n}}\nplatform_name: "CUDA"\n{version}\n'
        f'device_description_str: "{gpu.name}"\n'
    )

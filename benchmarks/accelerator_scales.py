"""Holds the sizes of accelerator.py's rows, their random weights, and what all of them measure with.

`full` is the model of configs/cmoe.py (EVA-CLIP-g, CMoE, LLaMA-2-7B with LoRA), frozen weights in
bfloat16; `toy` the same in small, for a CPU.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from train_step_rows import TRAINING

from unimed_jax.config import (
    Config,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
)
from unimed_jax.plan.chips import Chip, chip_of

FULL = ModelConfig(
    vision=VisionConfig(image_size=224, patch_size=14, width=1408, depth=39, heads=16, mlp_width=6144),
    connector=ConnectorConfig(),
    decoder=DecoderConfig(
        vocab=32000,
        width=4096,
        depth=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp_width=11008,
        norm_eps=1e-5,
    ),
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
    compute_dtype="bfloat16",
    frozen_dtype="bfloat16",
    remat="full",
)
TOY = dataclasses.replace(
    FULL,
    vision=VisionConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64),
    connector=ConnectorConfig(experts=2),
    decoder=DecoderConfig(vocab=256, width=32, depth=2, heads=4, kv_heads=4, head_dim=8, mlp_width=64),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Says how large the rows are."""

    model: ModelConfig
    copied: int  # bytes of the array that is copied
    side: int  # rows of the square matrices
    batch: tuple[int, int]  # rows and tokens of a row that the step trains on
    long: tuple[int, int]  # the same for long rows
    image_every: int  # tokens of a training row for each image
    prompt: int  # tokens before decoding begins
    new: int  # tokens of an answer
    experts: tuple[int, int, int, int]  # experts, width, hidden width, tokens
    repeats: int


SCALES = {
    "full": Scale(FULL, 4 << 30, 8192, (16, 256), (4, 1024), 256, 32, 128, (8, 2048, 5632, 4096), 5),
    "toy": Scale(TOY, 1 << 20, 64, (2, 64), (1, 128), 64, 8, 4, (4, 32, 64, 64), 2),
}
BATCHES = (1, 8, 32)
Values = dict[str, Any]
Emit = Callable[..., None]  # a row's name, and its values by name


def training(scale: Scale, rows: int, tokens: int, **model: Any) -> Config:
    """Gives the settings of a step on full rows; `model` replaces settings of the model."""
    images = tokens // scale.image_every
    return Config(
        model=dataclasses.replace(scale.model, **model),
        data=DataConfig(
            rows=rows, row_tokens=tokens, row_images=images, row_answers=images * scale.image_every // 4
        ),
        **TRAINING,
    )


@functools.partial(jax.jit, static_argnames="like")
def _random(seed, like: tuple[tuple[str, tuple[int, ...], str], ...]) -> dict[str, jax.Array]:
    leaves = {}
    for n, (path, shape, dtype) in enumerate(like):
        place = jnp.full(shape, seed + np.uint32(n), jnp.uint32)
        for axis, size in enumerate(shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        # a hash of the place: far cheaper than jax.random, and as good for this
        for shift in (16, 15, 16):
            place = (place ^ place >> shift) * np.uint32(0x9E3779B9)
        uniform = (place >> 8).astype(jnp.float32) * 2**-23 - 1  # [-1, 1)
        name = path.split("/")[-1]
        if name.endswith("scale"):
            leaves[path] = (1 + 0.1 * uniform).astype(dtype)
        elif name.endswith("bias") or len(shape) < 2:
            leaves[path] = (0.1 * uniform).astype(dtype)
        else:
            std = (
                0.02
                if name in ("embedding", "positions", "task_tokens", "lora_b")
                else shape[-2] ** -0.5
            )
            leaves[path] = (math.sqrt(3) * std * uniform).astype(dtype)
    return leaves


def random_leaves(shapes: dict[str, Any], seed: int = 0) -> dict[str, jax.Array]:
    """Makes random arrays of these shapes on the device, at scales that keep a model finite."""
    like = tuple((path, tuple(leaf.shape), str(leaf.dtype)) for path, leaf in shapes.items())
    return _random(np.uint32(seed), like)


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out


def usable_memory() -> float:
    """Returns the bytes that programs may use of the device."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def chip_here() -> Chip | None:
    return chip_of(jax.devices()[0].device_kind)


def peak() -> float:
    """Returns the GiB that this process has held of the device at most, or of memory on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else harness.peak_memory()

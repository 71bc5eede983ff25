"""Measures the device's limits and our training step for accelerator.py; starts each of our parts.

- `copy`: GB/s of reading and writing the device's memory. `product of matrices`: TFLOP/s of a bfloat16
  product of two random square matrices.
- `train`: the training step on 16 full rows of 256 tokens with one image and 64 answer tokens each;
  AdamW, and of the remat policies the first that fits by `plan`'s own count (unimed_jax/plan). Beside
  what is measured stands what that plan predicted: memory, and the roofline of the compiled program.
  MFU is useful FLOPs (unimed_jax/train/flops.py: 4N a token for the frozen decoder) over the chip's
  published dense bfloat16 peak; `of product` is the same over the measured product. The rows after it
  differ by what their name says.
- accelerator_decode.py and accelerator_kernels.py say what their rows are.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from accelerator_decode import decode
from accelerator_kernels import kernels
from accelerator_scales import (
    SCALES,
    Emit,
    Scale,
    Values,
    chip_here,
    peak,
    random_leaves,
    seconds,
    training,
    usable_memory,
)

from unimed_jax.config import Config
from unimed_jax.model import sharding
from unimed_jax.plan.programs import planned
from unimed_jax.plan.roofline import BOUNDS, costs
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.program import build, make_mesh
from unimed_jax.train.step import first_state

REMAT = ("none", "dots", "full")  # those that compute least again come first


def limits(scale: Scale, known: Values, emit: Emit) -> None:
    x = random_leaves({"x": jax.ShapeDtypeStruct((scale.copied // 4,), jnp.float32)})["x"]
    add = jax.jit(lambda x: x + 1)
    seconds(lambda: add(x), 2)
    best = min(seconds(lambda: add(x), 2 * scale.repeats))
    emit("copy", **{"seconds": best, "GB/s": 2 * scale.copied / best / 1e9})
    shape = jax.ShapeDtypeStruct((scale.side, scale.side), jnp.bfloat16)
    a, b = random_leaves({"a": shape, "b": shape}).values()
    product, chain = jax.jit(jnp.matmul), 10
    seconds(lambda: product(a, b), 2)
    # Several at once, so that starting one costs nothing.
    each = statistics.median(seconds(lambda: [product(a, b) for _ in range(chain)], scale.repeats))
    each /= chain
    emit("product of matrices", **{"seconds": each, "TFLOP/s": 2 * scale.side**3 / each / 1e12})


def train(scale: Scale, known: Values, emit: Emit) -> None:
    usable, tried = usable_memory(), {}
    for remat in REMAT:
        config = training(scale, *scale.batch, remat=remat)
        compiled, values = compile_step(config)
        if values["predicted GiB"] * 2**30 <= usable:
            emit("train", **tried, **time_step(scale, config, compiled, known), **values)
            return
        tried[f"{remat} remat needs GiB"] = values["predicted GiB"]
        del compiled
    raise MemoryError(f"no remat policy fits {usable / 2**30:.1f} GiB: {tried}")


def _variant(row: str, long: bool = False, **model: Any) -> Callable[[Scale, Values, Emit], None]:
    def run(scale: Scale, known: Values, emit: Emit) -> None:
        config = training(scale, *(scale.long if long else scale.batch), **model)
        compiled, values = compile_step(config)
        emit(row, **time_step(scale, config, compiled, known), **values)

    return run


def compile_step(config: Config) -> tuple[Any, Values]:
    """Compiles the step as `plan` does, for the device that is here, and says what that predicts."""
    mesh = make_mesh(config, jax.devices()[:1], usable_memory())
    assert mesh is not None
    start = time.perf_counter()
    compiled = planned(config, mesh, "train").lowered.compile()
    taken = time.perf_counter() - start
    memory = compiled.memory_analysis()
    parts = ("argument", "output", "temp", "generated_code")
    needed = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    values: Values = {
        "remat": config.model.remat,
        "compile s": taken,
        "predicted GiB": (needed - memory.alias_size_in_bytes) / 2**30,
        "of which temporaries": memory.temp_size_in_bytes / 2**30,
    }
    cost = costs(config, dict(mesh.shape), "train", compiled.as_text())
    values |= {
        "compiled FLOPs, x useful": cost["flops"]["ratio"],
        "GB moved": cost["bytes"]["compiled"] / 1e9,
        "GB moved, x ideal": cost["bytes"]["ratio"],
    }
    chip = chip_here()
    if chip is not None:
        times = (cost["flops"]["compiled"] / chip.flops, cost["bytes"]["compiled"] / chip.bandwidth)
        values["roofline s"] = max(times)
        values["roofline's bound"] = BOUNDS[times.index(max(times))]
    return compiled, values


def time_step(scale: Scale, config: Config, compiled: Any, known: Values) -> Values:
    """Runs the compiled step on random weights and full rows."""
    mesh = make_mesh(config, jax.devices()[:1], usable_memory())
    program = build(config, mesh)
    with sharding.inside(mesh):
        frozen = random_leaves(program.frozen)
        frozen = jax.device_put(frozen, sharding.parameter_shardings(frozen, mesh))
        leaves = random_leaves(program.state.leaves, seed=1)
        leaves = jax.device_put(leaves, sharding.parameter_shardings(leaves, mesh))
        state = first_state(leaves, program.optimizer, mesh)
        del leaves
        batch = sharding.on_devices(harness.full_rows(config), mesh)
        lr = jax.device_put(np.float32(1e-5), sharding.everywhere(mesh))
    losses = []

    def run():
        nonlocal state
        state, metrics = compiled(state, frozen, batch, lr)
        losses.append(metrics["loss"])
        return metrics

    seconds(run, 2)
    median = statistics.median(seconds(run, scale.repeats))
    first, last = float(losses[0]), float(losses[-1])
    if not math.isfinite(last):
        raise ValueError(f"the loss is {last}: the step computed nothing")
    data = config.data
    flops = sum(useful_flops(config, examples=data.row_images).values())
    out = {
        "rows x tokens": f"{data.rows} x {data.row_tokens}",
        "seconds": median,
        "tokens/s": data.rows * data.row_tokens / median,
        "images/s": data.rows * data.row_images / median,
        "useful TFLOP": flops / 1e12,
        "TFLOP/s": flops / median / 1e12,
        "first loss": first,
        "last loss": last,
        "peak GiB": peak(),
    }
    chip = chip_here()
    if chip is not None:
        out["MFU"] = flops / median / chip.flops
    if "product of matrices" in known:
        out["of product"] = out["TFLOP/s"] / known["product of matrices"]["TFLOP/s"]
    return out


PARTS: dict[str, Callable[[Scale, Values, Emit], None]] = {
    "limits": limits,
    "train": train,
    "decode": decode,
    "kernels": kernels,
    "train_full_remat": _variant("train, full remat", remat="full"),
    "train_long": _variant("train, rows of 1,024", long=True, remat="full"),
    "train_plain_attention": _variant("train, plain attention", remat="full", attention="xla"),
}


def about() -> Values:
    import flax
    import optax

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30
    versions = {package.__name__: package.__version__ for package in (jax, flax, optax, np)}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory GiB": round(memory, 1),
        **versions,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


if __name__ == "__main__":
    harness.report(PARTS, SCALES, about)

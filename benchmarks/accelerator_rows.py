"""Measures our rows of accelerator.py, each part in a process of its own.

- `copy`: GB/s of reading and writing the device's memory. `product of matrices`: TFLOP/s of a bfloat16
  product of two random square matrices.
- `train`: the training step of configs/cmoe.py's model (EVA-CLIP-g, CMoE, LLaMA-2-7B with LoRA) on 16
  full rows of 256 tokens with one image and 64 answer tokens each; frozen weights in bfloat16, AdamW,
  and of the remat policies the first that fits by `plan`'s own count (unimed_jax/plan). Beside what is
  measured stands what that plan predicted: memory, and the roofline of the compiled program. MFU is
  useful FLOPs (unimed_jax/train/flops.py: 4N a token for the frozen decoder) over the chip's published
  dense bfloat16 peak; `of product` is the same over the measured product. The rows after it differ by
  what their name says.
- `decode, batch B`: greedy answers of 128 tokens to B prompts of 32, by the engine's two programs
  (unimed_jax/model/slots.py) with only the 7B decoder (no adapters). The limit of a token is reading
  all its weights and the cache once (unimed_jax/plan/ideal.py), at the published bandwidth
  (`of roofline`) and at that of the copy.
- `attention`: the device's fused kernel against the plain form: values and gradients of both against
  the plain form in float32, then the time of forward and backward pass.
- `experts`: the same for grouped experts of the decoder against the dense path.
"""

import dataclasses
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A checkout is enough: nothing has to be installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from train_step_rows import TRAINING

from unimed_jax.config import (
    Config,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    MoeConfig,
    RuleConfig,
    TrainConfig,
    VisionConfig,
)
from unimed_jax.model import attention, cache, decoding, dispatch, sharding, slots
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.plan.chips import Chip, chip_of
from unimed_jax.plan.ideal import ideal
from unimed_jax.plan.programs import planned
from unimed_jax.plan.roofline import BOUNDS, costs
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.program import build, make_mesh
from unimed_jax.train.step import first_state

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
REMAT = ("none", "dots", "full")  # those that compute least again come first

Values = dict[str, Any]
Emit = Callable[..., None]  # a row's name, and its values by name


# ---------------------------------------------------------------------------------------------
# Weights and batches
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out


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


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


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


def usable_memory() -> float:
    """Returns the bytes that programs may use of the device."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


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


def chip_here() -> Chip | None:
    return chip_of(jax.devices()[0].device_kind)


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
        batch = sharding.on_devices(harness.full_rows(config), mesh, 1)
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


def peak() -> float:
    """Returns the GiB that this process has held of the device at most, or of memory on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else harness.peak_memory()


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------


def decode(scale: Scale, known: Values, emit: Emit) -> None:
    # The decoder only, next to the smallest encoder and connector that build.
    model = dataclasses.replace(TOY, decoder=scale.model.decoder, lora=LoraConfig(), remat="none")
    model = dataclasses.replace(
        model, connector=dataclasses.replace(TOY.connector, hidden=8, router_hidden=8)
    )
    empty = abstract(model)
    shapes = {p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for p, x in parameters(empty).items()}
    filled = with_parameters(empty, random_leaves(shapes))
    decoding.prepare(filled)
    config = Config(model=model, train=TrainConfig(rules=(RuleConfig("*", False),)))
    for rows in BATCHES:
        emit(f"decode, batch {rows}", **_decoded(scale, config, filled, rows, known))


def _decoded(scale: Scale, config: Config, model: nnx.Module, rows: int, known: Values) -> Values:
    prompt, new = scale.prompt, scale.new
    rng, ones = np.random.default_rng(0), np.ones((rows, prompt), np.int32)
    side = config.model.vision.image_size
    batch = {
        "images": np.zeros((rows, 0, side, side, 3), np.uint8),
        "image_tasks": np.zeros((rows, 0), np.int32),
        "tokens": rng.integers(3, config.model.decoder.vocab, ones.shape, np.int32),
        "visual": -ones,
        "segments": ones,
        "prefixes": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }
    number = np.arange(rows, dtype=np.int32)
    entry = slots.Entry(
        slots=number,
        places=number[:, None] * prompt + np.arange(prompt, dtype=np.int32)[None],
        prompts=np.full(rows, prompt, np.int32),
        most=np.full(rows, new, np.int32),
        seeds=number.astype(np.uint32),
        temperatures=np.zeros(rows, np.float32),
        first=np.bool_(True),
    )
    batch, entry, kept = jax.device_put((batch, entry, np.ones(rows, bool)))
    parts = slots.Parts.of(model, eos=-1, top_p=1.0, seed=0, draws=False)
    state = slots.empty(parts, rows, prompt, new)
    enter, advance = [], []
    for _ in range(1 + scale.repeats):  # the first one compiles
        start = time.perf_counter()
        state = jax.block_until_ready(slots.enter(parts, state, batch, entry))
        middle = time.perf_counter()
        state = jax.block_until_ready(slots.advance(parts, state, new - 1, rows + 1, kept))
        enter.append(middle - start)
        advance.append(time.perf_counter() - middle)
    if not (np.asarray(state.done) == new).all():
        raise ValueError(f"{new} tokens were asked for, and {np.asarray(state.done)} are there")
    total = statistics.median(a + b for a, b in zip(enter[1:], advance[1:], strict=True))
    token = statistics.median(advance[1:]) / (new - 1)
    sizes = dict(slots=rows, prompt=prompt, answer=new, rows=rows, tokens=prompt, images=0)
    least = ideal(config, {}, "decode", sizes=sizes)
    out = {
        "ms/token": 1e3 * token,
        "tokens/s": rows / token,
        "whole answers, s": total,
        "first s": enter[0] + advance[0],
        "GB at least": least.bytes / 1e9,
        "separate layers": isinstance(parts.model().decoder.layers, nnx.List),
        "peak GiB": peak(),
    }
    chip = chip_here()
    if chip is not None:
        out["of roofline"] = least.bytes / chip.bandwidth / token
    if "copy" in known:
        out["of copy"] = least.bytes / 1e9 / known["copy"]["GB/s"] / token
    return out


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


def kernels(scale: Scale, known: Values, emit: Emit) -> None:
    _attention(scale, emit)
    _experts(scale, emit)


def compared(scale: Scale, exact: Callable, sides: dict[str, Callable], inputs: tuple) -> Values:
    """Compares values and gradients with those of `exact` in float32, then times both passes.

    The sides are functions of the inputs with one output; an error is |x - exact| / |exact|.
    """

    def both(function: Callable) -> Callable:
        def run(inputs, dy):
            y, back = jax.vjp(lambda *inputs: function(*inputs), *inputs)
            return y, back(dy.astype(y.dtype))

        return jax.jit(run)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    like = jax.eval_shape(exact, *wide)
    dy = random_leaves({"dy/lora_b": jax.ShapeDtypeStruct(like.shape, like.dtype)}, 9)["dy/lora_b"]
    wanted = jax.device_get(both(exact)(wide, dy))
    out: Values = {}
    for name, side in sides.items():
        run = both(side)
        found = jax.device_get(run(inputs, dy))
        errors = [
            float(np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        ]
        if not max(errors) < 0.05:  # so that NaN does not pass
            raise ValueError(f"{name} differs from the reference by {max(errors):.2g}")
        seconds(functools.partial(run, inputs, dy), 2)
        times = seconds(functools.partial(run, inputs, dy), 2 * scale.repeats)
        out |= {f"{name} ms": 1e3 * statistics.median(times)}
        out |= {f"{name} error": errors[0], f"{name} largest error of a gradient": max(errors[1:])}
    return out


def _attention(scale: Scale, emit: Emit) -> None:
    rows, tokens = scale.batch
    c = scale.model.decoder
    wide, narrow = (rows, tokens, c.heads, c.head_dim), (rows, c.kv_heads, tokens, c.head_dim)
    shapes = {
        f"{n}/positions": jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for n, s in enumerate((wide, narrow, narrow))
    }
    q, k, v = (50 * x for x in random_leaves(shapes).values())  # of size 1
    half = np.repeat(np.arange(2), tokens // 2)[None].repeat(rows, axis=0)  # two segments a row
    place = np.tile(np.arange(tokens // 2), (rows, 2))
    mask = cache.visible(*(cache.Span(*map(jnp.asarray, (place, half + 1, half + 1))),) * 2)
    name = {"nvidia": "cudnn", "tpu": "splash"}.get(attention.hardware(), "cudnn")
    plain = functools.partial(attention.attend, mask=mask, implementation="xla")
    sides = {"plain": plain}
    refused = attention.refusal(name, q, k, mask, None)
    if refused is None:
        sides[name] = functools.partial(attention.attend, mask=mask, implementation=name)
    values = compared(scale, plain, sides, (q, k, v))
    emit("attention", **values, **({"no fused kernel": refused} if refused else {}))


def _experts(scale: Scale, emit: Emit) -> None:
    count, width, hidden, tokens = scale.experts
    decoder = dataclasses.replace(TOY.decoder, width=width, mlp_width=hidden, gated_mlp=True)
    moe = jax.eval_shape(
        lambda: dispatch.Moe(MoeConfig(experts=count, meta=False), decoder, nnx.Rngs(0))
    )
    graph, state = nnx.split(moe)
    leaves, tree = jax.tree.flatten(state)
    named = {f"{n}/kernel": jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in enumerate(leaves)}
    rounded = [x.astype(jnp.bfloat16) for x in random_leaves(named).values()]
    x = random_leaves({"x/positions": jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16)})
    x = 50 * x["x/positions"]

    def path(name: str) -> Callable:
        def run(x, leaves):
            module = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
            module.config = dataclasses.replace(module.config, path=name)
            return module(x)[0]

        return run

    values = compared(
        scale, path("dense"), {"dense": path("dense"), "grouped": path("grouped")}, (x, rounded)
    )
    emit("experts", shape=f"{count} x {width} x {hidden}, {tokens} tokens", **values)


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

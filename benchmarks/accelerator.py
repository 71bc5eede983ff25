"""Measures how near full-size Uni-Med comes to the limits of one accelerator.

    python benchmarks/accelerator.py --out=accelerator.jsonl --budget=300
    python benchmarks/accelerator.py --out=tiny.jsonl --tiny

The second command runs the same rows at toy size, on a CPU in seconds.

The cheapest rows come first. Each is written as soon as it is measured: a JSON line to --out, and the
table so far to the same name with the ending .md. A row that would not end within --budget seconds is
skipped, one that fails (out of memory, say) is noted, and the next one runs.

- `copy`: GB/s of reading and writing the device's memory.
- `matmul`: TFLOP/s of a bfloat16 product of two random square matrices.
- `decode, batch B`: tokens/s of greedy generation with only the 7B decoder (adapters merged,
  prompts of 32 tokens, no early end; the prompt's pass counts as one token). The limit is reading
  all its weights once a token, at the copy's bandwidth.
- `train RxS`: the training step of configs/cmoe.py's model (EVA-CLIP-g, CMoE, LLaMA-2-7B with LoRA)
  on R full rows of S tokens, of which one image in 256 tokens and 64 answer tokens each; frozen
  weights in bfloat16, full remat, AdamW. MFU is useful FLOPs (unimed_jax/train/flops.py: 4N a token
  for the frozen decoder) over the chip's published dense bfloat16 peak; `of matmul` is the same
  over the measured product. `plain attention` and `no dropout` say what the fused kernel saves and
  what drawing random numbers costs.

All numbers of weights and batch are random, made on the device. Only jax, flax,
optax and numpy are needed.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A checkout is enough: nothing has to be installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
if __name__ == "__main__":  # not when a test imports this file, whose process starts others
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimed_jax.config import (
    Config,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuleConfig,
    TrainConfig,
    VisionConfig,
)
from unimed_jax.model.generate import generate
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.plan.chips import chip_of
from unimed_jax.train.flops import useful_flops
from unimed_jax.train.program import build
from unimed_jax.train.step import first_state

PAD = 0
PROMPT = 32  # tokens before decoding begins

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
TINY = dataclasses.replace(
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
    new: int  # tokens of an answer
    image_every: int  # tokens of a training row for each image
    train: tuple[tuple[int, int, str], ...]  # rows, tokens of a row, what differs (see `training`)
    repeats: int


FULL_ROWS = (
    (16, 256, ""),
    (4, 1024, ""),
    (4, 1024, "no dropout"),
    (4, 1024, "plain attention"),
    (16, 1024, ""),
)
SCALES = {
    "full": Scale(FULL, 4 << 30, 8192, 128, 256, FULL_ROWS, 5),
    "tiny": Scale(TINY, 1 << 20, 64, 4, 16, ((2, 64, ""),), 2),
}


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
# Rows
# ---------------------------------------------------------------------------------------------

Values = dict[str, Any]


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out


def copy(scale: Scale, earlier: dict[str, Values]) -> Values:
    x = jnp.zeros(scale.copied // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    seconds(lambda: add(x), 2)
    best = min(seconds(lambda: add(x), 2 * scale.repeats))
    return {"seconds": best, "GB/s": 2 * scale.copied / best / 1e9}


def matmul(scale: Scale, earlier: dict[str, Values]) -> Values:
    shape = jax.ShapeDtypeStruct((scale.side, scale.side), jnp.bfloat16)
    a, b = random_leaves({"a": shape, "b": shape}).values()
    product, chain = jax.jit(jnp.matmul), 10
    seconds(lambda: product(a, b), 2)
    # Several at once, so that starting one costs nothing.
    median = (
        statistics.median(seconds(lambda: [product(a, b) for _ in range(chain)], scale.repeats)) / chain
    )
    return {"seconds": median, "TFLOP/s": 2 * scale.side**3 / median / 1e12}


def decode(scale: Scale, earlier: dict[str, Values], rows: int) -> Values:
    # The decoder only, next to the smallest encoder and connector that build.
    model = dataclasses.replace(TINY, decoder=scale.model.decoder, lora=LoraConfig(), remat="none")
    model = dataclasses.replace(
        model, connector=dataclasses.replace(TINY.connector, hidden=8, router_hidden=8)
    )
    shapes = {
        p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for p, x in parameters(abstract(model)).items()
    }
    filled: nnx.Module = with_parameters(abstract(model), random_leaves(shapes))
    side = model.vision.image_size
    ones = np.ones((rows, PROMPT), np.int32)
    batch = {
        "images": np.zeros((rows, 0, side, side, 3), np.uint8),
        "image_tasks": np.zeros((rows, 0), np.int32),
        "tokens": np.random.default_rng(0).integers(3, model.decoder.vocab, ones.shape, np.int32),
        "visual": -ones,
        "segments": ones,
        "prefixes": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }
    batch = jax.device_put(batch)
    run = functools.partial(generate, filled, batch, max_new_tokens=scale.new, eos=-1, pad=PAD)
    (compiled,) = seconds(run, 1)
    median = statistics.median(seconds(run, scale.repeats))
    read = sum(
        2 * x.size for p, x in shapes.items() if p.startswith("decoder/") and p != "decoder/embedding"
    )
    per_token = median / scale.new
    out = {
        "seconds": median,
        "ms/token": 1e3 * per_token,
        "tokens/s": rows / per_token,
        "compile s": compiled - median,
    }
    out["weights GB/s"] = read / per_token / 1e9
    if "GB/s" in earlier.get("copy", {}):
        out["of copy"] = out["weights GB/s"] / earlier["copy"]["GB/s"]
    return out


def training(scale: Scale, rows: int, tokens: int, variant: str = "") -> Config:
    images, model = tokens // scale.image_every, scale.model
    if variant == "plain attention":
        model = dataclasses.replace(model, attention="xla")
    elif variant == "no dropout":
        model = dataclasses.replace(model, lora=dataclasses.replace(model.lora, dropout=0.0))
    return Config(
        model=model,
        data=DataConfig(
            rows=rows, row_tokens=tokens, row_images=images, row_answers=images * scale.image_every // 4
        ),
        loss=LossConfig(reduction="token"),
        optimizer=OptimizerConfig(skip_unused=True),
        train=TrainConfig(
            rules=(
                RuleConfig("decoder/*/lora_?", True),
                RuleConfig("connector/*", True),
                RuleConfig("*", False),
            )
        ),
    )


def train(scale: Scale, earlier: dict[str, Values], rows: int, tokens: int, variant: str = "") -> Values:
    config = training(scale, rows, tokens, variant)
    program = build(config, None)
    start = time.perf_counter()
    step = program.lower().compile()
    compiled = time.perf_counter() - start
    frozen = random_leaves(program.frozen)
    state = first_state(random_leaves(program.state.leaves, seed=1), program.optimizer)
    batch, lr = jax.device_put((harness.full_rows(config), np.float32(1e-5)))
    losses = []

    def run():
        nonlocal state
        state, metrics = step(state, frozen, batch, lr)
        losses.append(metrics["loss"])
        return metrics

    seconds(run, 2)
    median = statistics.median(seconds(run, scale.repeats))
    flops = sum(useful_flops(config, examples=config.data.row_images).values())
    memory = step.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    out = {
        "seconds": median,
        "tokens/s": rows * tokens / median,
        "images/s": rows * config.data.row_images / median,
        "useful TFLOP": flops / 1e12,
        "TFLOP/s": flops / median / 1e12,
        "compile s": compiled,
        "program GiB": (needed - memory.alias_size_in_bytes) / 2**30,
        "temporaries GiB": memory.temp_size_in_bytes / 2**30,
        "first loss": float(losses[0]),
        "last loss": float(losses[-1]),
    }
    if not math.isfinite(out["last loss"]):
        raise ValueError(f"the loss is {out['last loss']}: the step computed nothing")
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        out["MFU"] = flops / median / chip.flops
    if "TFLOP/s" in earlier.get("matmul", {}):
        out["of matmul"] = out["TFLOP/s"] / earlier["matmul"]["TFLOP/s"]
    return out


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    estimate: float  # seconds on an H100, compiling included
    run: Callable[[Scale, dict[str, Values]], Values]


def rows_of(scale: Scale) -> list[Row]:
    """Lists all rows, the cheapest first."""
    rows = [
        Row("copy", 5, copy),
        Row("matmul", 10, matmul),
        Row("decode, batch 1", 30, functools.partial(decode, rows=1)),
        Row("decode, batch 16", 30, functools.partial(decode, rows=16)),
    ]
    for count, tokens, variant in scale.train:
        name = f"train {count}x{tokens}{variant and ', '}{variant}"
        rows.append(Row(name, 60, functools.partial(train, rows=count, tokens=tokens, variant=variant)))
    return rows


# ---------------------------------------------------------------------------------------------
# Measuring and writing
# ---------------------------------------------------------------------------------------------


def machine() -> Values:
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
    }


def table(about: Values, results: Sequence[Values]) -> str:
    """Writes Markdown: what was measured on, then a line for each row."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
        "| row | measured |",
        "| --- | --- |",
    ]
    for result in results:
        result = dict(result)
        name = result.pop("row")
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in result.items()
        )
        lines.append(f"| {name} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"


def measure(scale: Scale, budget: float, out: Path, only: Sequence[str] = ()) -> list[Values]:
    """Runs the rows within `budget` seconds and writes each at once."""
    start = time.perf_counter()
    about, results, earlier = machine(), [], {}
    out.write_text(json.dumps(about) + "\n")
    print(json.dumps(about), flush=True)
    for row in rows_of(scale):
        if only and not any(row.name.startswith(name) for name in only):
            continue
        begun = time.perf_counter()
        left = budget - (begun - start)
        if row.estimate > left:
            values: Values = {
                "skipped": f"it takes about {row.estimate:.0f} s, and {left:.0f} s are left"
            }
        else:
            try:
                values = earlier[row.name] = row.run(scale, earlier)
            except Exception as error:
                traceback.print_exc()
                values = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            jax.clear_caches()
            # models refer to themselves: their arrays would stay until some later collection
            gc.collect()
            values["peak GiB so far"] = (jax.devices()[0].memory_stats() or {}).get(
                "peak_bytes_in_use", 0
            ) / 2**30
        values = {"row": row.name, **values, "row s": time.perf_counter() - begun}
        results.append(values)
        with out.open("a") as lines:
            lines.write(json.dumps(values) + "\n")
        out.with_suffix(".md").write_text(table(about, results))
        print(json.dumps(values), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="file of JSON lines; the table is written next to it"
    )
    parser.add_argument("--budget", type=float, default=300, help="seconds, for all rows together")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a test on any machine")
    parser.add_argument("--only", nargs="+", default=(), help="beginnings of the names of rows to run")
    arguments = parser.parse_args()
    results = measure(
        SCALES["tiny" if arguments.tiny else "full"], arguments.budget, arguments.out, arguments.only
    )
    print(arguments.out.with_suffix(".md").read_text())
    sys.exit(any("failed" in result for result in results))


if __name__ == "__main__":
    main()

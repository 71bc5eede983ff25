"""Measures our rows of accelerator.py that decode.

`decode, batch B`: greedy answers of 128 tokens to B prompts of 32, by the engine's two programs
(unimed_jax/model/slots.py) with only the 7B decoder (no adapters). The limit of a token is reading all
its weights and the cache once (unimed_jax/plan/ideal.py), at the published bandwidth (`of roofline`) and
at that of the copy.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_scales import BATCHES, TOY, Emit, Scale, Values, chip_here, peak, random_leaves
from flax import nnx

from unimed_jax.config import Config, LoraConfig, RuleConfig, TrainConfig
from unimed_jax.model import decoding, slots
from unimed_jax.model.parameters import abstract, parameters, with_parameters
from unimed_jax.plan.ideal import ideal


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

"""Builds the programs that are planned: the training step, a pass over prompts, one decoding step.

Nothing is allocated: weights, moments and batches are shapes. Sizes are those of one device.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.model import sharding
from unimed_jax.model.cache import Cache, Span
from unimed_jax.model.parameters import with_parameters
from unimed_jax.model.unimed import span_of
from unimed_jax.train.loss import task_losses
from unimed_jax.train.program import Program, batch_shapes, build

PROGRAMS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Planned:
    """Holds a program that is ready to compile, and the bytes that one device needs for its parts."""

    lowered: jax.stages.Lowered
    arguments: dict[str, float]  # kind -> bytes: frozen, trained, optimizer, batch, cache
    activations: float  # bytes that the forward pass keeps for the backward pass


def planned(config: Config, mesh: Mesh, program: str) -> Planned:
    """Lowers a program of `PROGRAMS` for the devices of a mesh."""
    return _MAKERS[program](config, build(config, mesh), mesh)


def device_bytes(tree: Any) -> float:
    """Adds up the bytes that one device holds of arrays that are described with their shardings."""

    def share(leaf: Any) -> float:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(share, jax.tree.leaves(tree)))


def _train(config: Config, built: Program, mesh: Mesh) -> Planned:
    arguments = {
        "frozen": device_bytes(built.frozen),
        "trained": device_bytes(built.state.leaves),
        "optimizer": device_bytes((built.state.moments, built.state.memory)),
        "batch": device_bytes(built.batch),
    }
    return Planned(built.lower(), arguments, saved_bytes(config, built, mesh))


def saved_bytes(config: Config, built: Program, mesh: Mesh) -> float:
    """Estimates the bytes of activations that a device keeps from the forward to the backward pass.

    They are shared out as the rows of a micro-batch are. The compiler may keep less, by computing
    again, or more, by copying.
    """
    micro = config.data.rows // config.train.accumulation
    with sharding.inside(mesh):
        each = row_bytes(config, built)
    return each * sharding.row_sharding((micro,), mesh).shard_shape((micro,))[0]


def row_bytes(config: Config, built: Program) -> float:
    """Counts the bytes that the backward pass reads of the forward pass for each row of a batch.

    Weights do not count, since they do not grow with rows. Attention is that of the mesh in context.
    """
    return _read_by_backward(config, built, 2) - _read_by_backward(config, built, 1)


def _read_by_backward(config: Config, built: Program, rows: int) -> float:
    """Adds up what the backward pass reads that the forward pass has made, for so many rows."""
    batch = {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in batch_shapes(config).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0)) if config.model.lora.dropout else None

    def kept(leaves, frozen, batch, key):
        def loss(leaves):
            full = with_parameters(built.model, {**frozen, **leaves})
            return task_losses(full, batch, config.loss, None, key)[0].total

        return jax.tree.leaves(jax.vjp(loss, leaves)[1])

    traced = jax.make_jaxpr(kept)(built.state.leaves, built.frozen, batch, key).jaxpr
    given = set(map(id, (*traced.invars, *traced.constvars)))
    made: dict[int, Any] = {id(out): out.aval for out in traced.outvars if id(out) not in given}
    return sum(aval.size * aval.dtype.itemsize for aval in made.values())


def _answering(config: Config, built: Program, mesh: Mesh) -> tuple[Any, dict[str, float], int, int]:
    """Returns the model's leaves, their bytes, and the tokens of a prompt and of an answer."""
    arguments = {"frozen": device_bytes(built.frozen), "trained": device_bytes(built.state.leaves)}
    return built.leaves, arguments, config.text.max_prompt, config.evaluate.max_new_tokens


def _prefill(config: Config, built: Program, mesh: Mesh) -> Planned:
    """Lowers the pass over `config.evaluate.batch` prompts of full length, up to their first tokens."""
    leaves, arguments, prompt, new = _answering(config, built, mesh)
    rows, side = config.evaluate.batch, config.model.vision.image_size
    shapes = {
        "images": ((rows, config.data.row_images, side, side, 3), jnp.uint8),
        "image_tasks": ((rows, config.data.row_images), jnp.int32),
    }
    by_token = ("tokens", "visual", "segments", "prefixes", "positions")
    shapes |= dict.fromkeys(by_token, ((rows, prompt), jnp.int32))
    batch = {name: _by_row(shape, dtype, mesh) for name, (shape, dtype) in shapes.items()}
    dtype = config.model.compute_dtype

    def prefill(leaves, batch):
        model = with_parameters(built.model, leaves)
        span = span_of(batch)
        full = Span(*(jnp.pad(part, ((0, 0), (0, new))) for part in span))  # [B, P + new]
        x, _ = model.embed(batch)
        hidden, cache, *_ = model.decoder(x, span, model.decoder.empty_cache(full, dtype), 0)
        return jnp.argmax(model.decoder.logits(hidden[:, -1]), axis=-1), cache

    arguments["batch"] = device_bytes(batch)
    with sharding.inside(mesh):
        lowered = jax.jit(prefill).lower(leaves, batch)
    return Planned(lowered, arguments, 0.0)


def _decode(config: Config, built: Program, mesh: Mesh) -> Planned:
    """Lowers the pass of one further token of each row over a full cache."""
    leaves, arguments, prompt, new = _answering(config, built, mesh)
    rows, decoder = config.evaluate.batch, config.model.decoder
    dtype = jnp.dtype(config.model.compute_dtype)
    places = _by_row((rows, prompt + new), jnp.int32, mesh)
    shape = (decoder.depth, rows, decoder.kv_heads, prompt + new, decoder.head_dim)
    names = (None, "batch", "heads", None, None)
    spec = sharding.spec(shape, names, dict(mesh.shape))
    stored: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
    cache = Cache(stored, stored, Span(places, places, places))
    token, place = _by_row((rows, 1), jnp.int32, mesh), jax.ShapeDtypeStruct((), jnp.int32)

    def decode(leaves, cache, token, place):
        model = with_parameters(built.model, leaves)
        here = Span(*(jax.lax.dynamic_slice_in_dim(part, place, 1, axis=1) for part in cache.span))
        x = model.decoder.embed(token, dtype)
        hidden, cache, *_ = model.decoder(x, here, cache, place)
        return jnp.argmax(model.decoder.logits(hidden), axis=-1), cache

    arguments["cache"] = device_bytes(cache)
    with sharding.inside(mesh):
        lowered = jax.jit(decode, donate_argnums=1).lower(leaves, cache, token, place)
    return Planned(lowered, arguments, 0.0)


def _by_row(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    """Describes an array that is split by its rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.row_sharding(shape, mesh))


_MAKERS: Mapping[str, Callable[[Config, Program, Mesh], Planned]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
}

"""Builds the programs that are planned: the training step, and the engine's two, prefill and decode.

Nothing is allocated: weights, moments and batches are shapes. Sizes are those of one device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from unimed_jax.config import Config
from unimed_jax.model import decoding, sharding, slots
from unimed_jax.model.parameters import tree_bytes, with_parameters
from unimed_jax.predict.sizes import Sizes, sizes_for_any
from unimed_jax.train.loss import task_losses
from unimed_jax.train.program import Program, batch_shapes, build

PROGRAMS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Planned:
    """Holds a program that is ready to compile, and the bytes that one device needs for its parts."""

    lowered: jax.stages.Lowered
    arguments: dict[str, float]  # kind -> bytes: frozen, trained, optimizer, batch, cache
    activations: float  # bytes that the forward pass keeps for the backward pass
    sizes: Sizes | None = None  # of the engine's programs


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


def _answering(
    config: Config, built: Program, mesh: Mesh
) -> tuple[slots.Parts, slots.Slots, Sizes, dict[str, float]]:
    """Describes what the engine's programs take (predict/engine.py), for any requests.

    The last one returned are the bytes of the model's leaves.
    """
    arguments = {"frozen": device_bytes(built.frozen), "trained": device_bytes(built.state.leaves)}
    model = with_parameters(built.model, built.leaves)
    if decoding.wants_separate(model.decoder):
        decoding.separate_layers(model.decoder, _described_layer)
    sizes = sizes_for_any(config, config.evaluate.batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    parts = slots.Parts(*nnx.split(model), _everywhere(key, mesh), eos=0, top_p=1.0, draws=False)
    empty = functools.partial(slots.empty, slots=sizes.slots, prompt=sizes.prompt, answer=sizes.answer)
    state = jax.tree.map(lambda x: _everywhere(x, mesh), jax.eval_shape(empty, parts))
    spec = sharding.spec(state.keys.shape, slots.CACHE, dict(mesh.shape))
    place = jax.sharding.NamedSharding(mesh, spec)
    cache = jax.ShapeDtypeStruct(state.keys.shape, state.keys.dtype, sharding=place)
    return parts, state._replace(keys=cache, values=cache), sizes, arguments


def _described_layer(leaf: Any, number: int) -> Any:
    """Describes a layer's part of a stacked leaf, where the stack lies."""
    place = leaf.sharding
    if place is not None:
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*place.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)


def _prefill(config: Config, built: Program, mesh: Mesh) -> Planned:
    """Lowers the engine's pass over rows of prompts, up to their first tokens."""
    with sharding.inside(mesh):
        parts, state, sizes, arguments = _answering(config, built, mesh)
        rows, side, questions = sizes.rows, config.model.vision.image_size, sizes.rows * sizes.questions
        shapes = {
            "images": ((rows, sizes.images, side, side, 3), jnp.uint8),
            "image_tasks": ((rows, sizes.images), jnp.int32),
        }
        by_token = ("tokens", "visual", "segments", "prefixes", "positions")
        shapes |= dict.fromkeys(by_token, ((rows, sizes.tokens), jnp.int32))
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
        numbers = jax.ShapeDtypeStruct((questions,), jnp.int32)
        entry = slots.Entry(
            slots=numbers,
            places=jax.ShapeDtypeStruct((questions, sizes.prompt), jnp.int32),
            prompts=numbers,
            most=numbers,
            seeds=jax.ShapeDtypeStruct((questions,), jnp.uint32),
            temperatures=jax.ShapeDtypeStruct((questions,), jnp.float32),
            first=jax.ShapeDtypeStruct((), jnp.bool_),
        )
        lowered = slots.enter.lower(parts, state, batch, entry)
    arguments |= {"batch": tree_bytes(batch), "cache": device_bytes(state)}
    return Planned(lowered, arguments, 0.0, sizes)


def _decode(config: Config, built: Program, mesh: Mesh) -> Planned:
    """Lowers the engine's loop that picks one further token of every slot."""
    with sharding.inside(mesh):
        parts, state, sizes, arguments = _answering(config, built, mesh)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        kept = jax.ShapeDtypeStruct((sizes.slots,), jnp.bool_)
        lowered = slots.advance.lower(parts, state, number, number, kept)
    return Planned(lowered, arguments | {"cache": device_bytes(state)}, 0.0, sizes)


def _everywhere(leaf: Any, mesh: Mesh) -> Any:
    """Describes an array that every device holds whole."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.everywhere(mesh))


_MAKERS: Mapping[str, Callable[[Config, Program, Mesh], Planned]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
}
